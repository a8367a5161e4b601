"""Private names of torch that this room stands on: these tests fail when they move."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.position.flow import TensorInfo


def test_views_share_the_number_of_their_memory_and_others_do_not() -> None:
    x = torch.zeros(4, 6)
    numbers = {TensorInfo.of(view).storage for view in (x, x[1:], x.T, x.detach(), x.view(6, 4))}  # type: ignore[union-attr]
    assert len(numbers) == 1
    other = TensorInfo.of(x.clone())
    assert other is not None
    assert other.storage not in numbers


def test_a_weak_reference_to_a_memory_keeps_its_number_from_being_used_again() -> None:
    x = torch.zeros(8)
    reference = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
    assert not reference.expired()  # type: ignore[no-untyped-call]
    number = x.untyped_storage()._cdata
    del x
    assert reference.expired()  # type: ignore[no-untyped-call]
    made = [torch.zeros(8) for _ in range(64)]
    assert number not in {y.untyped_storage()._cdata for y in made}


def test_fake_tensors_are_told_apart_and_the_mode_can_be_left() -> None:
    with FakeTensorMode():
        assert is_fake(torch.zeros(3))
        with unset_fake_temporarily():
            inside = torch.arange(3)
        assert is_fake(torch.zeros(3))
    assert not is_fake(inside)
    assert inside.tolist() == [0, 1, 2]


def test_the_table_of_tensors_goes_by_identity_and_keeps_nothing_alive() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    table = WeakIdKeyDictionary()
    table[x] = 1
    assert x in table
    assert y not in table
    del x
    assert len(table) == 0
