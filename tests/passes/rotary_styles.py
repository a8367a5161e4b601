"""Self-attention with position encodings in the ways that video DiTs write them, each beside the same by hand.

Tokens S, width 16, two heads of 8. `forward` is written as a model would, `rotated` says what it does to (B, H, S, D).
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.toys import HEADS, WIDTH, heads

HEAD_DIM = WIDTH // HEADS
TEXT = 9


def angles(tokens: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """(S, D / 2)."""
    positions = torch.arange(first, first + tokens, dtype=dtype)
    return positions[:, None] * torch.tensor([0.7, 0.31, 0.12, 0.05], dtype=dtype)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Channels 2 i and 2 i + 1 of (B, H, S, D) turned by angle i."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(pairs, dim=-1).flatten(-2)


class Rotary(nn.Module):
    """Separate projections, and positions given as an argument, as a model would compute them once for all layers."""

    key_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, self.key_heads * HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        angle = angles(x.shape[1], x.dtype)
        out = self.attend(self.place(self.q(x), angle), self.place(self.k(x), angle), heads_of(self.v(x)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        """(B, S, H * D) -> (B, H, S, D) with position."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    # ---- by hand

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value before position, (B, H, S, D)."""
        return tuple(heads_of(projection(x)) for projection in (self.q, self.k, self.v))  # type: ignore[return-value]

    def rotated(self, x: Tensor) -> Tensor:
        return turned(x, angles(x.shape[2], x.dtype))

    def video_rows(self, rows: Tensor, video: int) -> Tensor:
        """The video's of all tokens' rows, (B, S, C)."""
        return rows

    def with_update(self, rows: Tensor, update: Tensor) -> Tensor:
        """An update of the video's rows added to all."""
        return rows + update

    def finish(self, rows: Tensor, video: int) -> Tensor:
        """What the module makes of the attention."""
        result: Tensor = self.o(rows)
        return result


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class InPlace(Rotary):
    """Wan: an empty tensor, and its even and odd channels written."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, HEAD_DIM))
        cos, sin = (
            angle.cos().repeat_interleave(2, -1)[None, :, None],
            angle.sin().repeat_interleave(2, -1)[None, :, None],
        )
        one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = one * cos[..., 0::2] - two * sin[..., 1::2]
        out[..., 1::2] = one * sin[..., 1::2] + two * cos[..., 0::2]
        return out.type_as(x).transpose(1, 2)


class StackedFlat(Rotary):
    """LTX: before the split into heads."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = (t.repeat_interleave(2, -1).repeat(1, HEADS)[None] for t in (angle.cos(), angle.sin()))
        real, imaginary = x.unflatten(2, (-1, 2)).unbind(-1)
        other = torch.stack([-imaginary, real], dim=-1).flatten(2)
        return heads((x * cos + other * sin).to(x.dtype))


class Halves(Rotary):
    """Cosmos and most language models: halves instead of pairs."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = heads_of(x)
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], axis=-1) * sin  # type: ignore[call-overload]  # NumPy's name

    def rotated(self, x: Tensor) -> Tensor:
        angle = angles(x.shape[2], x.dtype)
        first, second = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
        turned_halves = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat(turned_halves, -1)


class Complex(Rotary):
    """AnyFlow: by complex numbers, in another precision."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, HEAD_DIM))
        rotation = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, None]
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(3, (-1, 2)))
        return torch.view_as_real(pairs * rotation).flatten(3, 4).type_as(x).transpose(1, 2)


class Partial(Rotary):
    """MiniMax: some channels only."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        turning, rest = heads_of(x).split([4, HEAD_DIM - 4], dim=-1)
        return torch.cat([turned(turning, angle[:, :2]), rest], dim=-1)

    def rotated(self, x: Tensor) -> Tensor:
        angle = angles(x.shape[2], x.dtype)
        return torch.cat([turned(x[..., :4], angle[:, :2]), x[..., 4:]], dim=-1)


class Matrices(Rotary):
    """Kandinsky: rotation matrices, multiplied and summed."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, :, None]
        x = x.unflatten(-1, (-1, HEAD_DIM))
        pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
        return (matrices * pairs).sum(dim=-1).reshape(*x.shape).transpose(1, 2)


class Split(Rotary):
    """LTX2: writes through views of a product."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = heads_of(x)
        parts = x.unflatten(-1, (2, -1))
        out = parts * angle.cos()[:, None]
        first, second = out[..., :1, :], out[..., 1:, :]
        first.addcmul_(-angle.sin()[:, None], parts[..., 1:, :])
        second.addcmul_(angle.sin()[:, None], parts[..., :1, :])
        return out.reshape(x.shape)

    rotated = Halves.rotated


class Products(Rotary):
    """One matrix for each token, through einsum."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        matrices = turned(torch.eye(HEAD_DIM, dtype=x.dtype)[None, None].expand(1, 1, -1, -1), angles(1, x.dtype, 3))
        matrices = torch.stack([torch.linalg.matrix_power(matrices[0, 0], s % 5) for s in range(x.shape[1])])
        return torch.einsum("sji,bhsj->bhsi", matrices, heads_of(x))

    def rotated(self, x: Tensor) -> Tensor:
        angle = angles(1, x.dtype, 3)
        return torch.stack([turned(x[:, :, s], (s % 5) * angle) for s in range(x.shape[2])], dim=2)


class Precise(Products):
    """Position in full precision whatever the model runs in."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().place(x.to(angle.dtype), angle)


class Normed(Rotary):
    """A norm before position, with weights for all channels, and more of them for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.per_head = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH).view(HEADS, 1, HEAD_DIM))
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return turned(heads(self.norm(x)) * self.per_head, angle)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (heads(self.norm(projection(x))) * self.per_head for projection in (self.q, self.k))
        return q, k, heads(self.v(x))


class Modulated(Rotary):
    """A factor per sample and channel, which is no position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", torch.linspace(0.5, 1.5, 2 * WIDTH).view(2, 1, WIDTH))

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return turned(heads(x * self.factors), angle)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (heads(projection(x) * self.factors) for projection in (self.q, self.k))
        return q, k, heads(self.v(x))


class Overwritten(Rotary):
    """Rotates the projected tensor itself, after an in-place norm."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = heads(x).contiguous()
        x *= 0.8
        x[:] = turned(x, angle)
        return x

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().before(x)
        return q * 0.8, k * 0.8, v


class Scaled(Rotary):
    """The scale of the scores is in the query already: the weights of linear attention have none."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return turned(heads(x), angle)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * HEAD_DIM**-0.5
        k /= 2.0
        return F.scaled_dot_product_attention(q, k, v, scale=2.0)


class Repeated(Rotary):
    """One key head, repeated by the model itself."""

    key_heads = 1

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return turned(heads_of(x), angle)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().before(x)
        return q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1)


class Grouped(Repeated):
    """One key head, shared in the call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Learned(Rotary):
    """A table of factors that is a parameter: by its shape it is position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(0.5, 1.5, 70 * HEAD_DIM).view(70, HEAD_DIM))

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return heads(x) * self.table

    def rotated(self, x: Tensor) -> Tensor:
        return x * self.table


class Single(Rotary):
    """CogVideoX: [text, video] through one projection, the video's part written in place."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        both = torch.cat([text, x], dim=1)
        q, k = (
            self.place(self.q(both), angles(x.shape[1], x.dtype)),
            self.place(self.k(both), angles(x.shape[1], x.dtype)),
        )
        out = self.attend(q, k, heads(self.v(both))).transpose(1, 2).flatten(2)
        result: Tensor = self.o(out)[:, TEXT:]
        return result

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = F.layer_norm(heads(x), (HEAD_DIM,))
        x[:, :, TEXT:] = turned(x[:, :, TEXT:], angle)
        return x

    def before(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v = super().before(torch.cat([text, x], dim=1))
        return F.layer_norm(q, (HEAD_DIM,)), F.layer_norm(k, (HEAD_DIM,)), v

    def rotated(self, x: Tensor) -> Tensor:
        angle = angles(x.shape[2] - TEXT, x.dtype)
        return torch.cat([x[:, :, :TEXT], turned(x[:, :, TEXT:], angle)], dim=2)

    def video_rows(self, rows: Tensor, video: int) -> Tensor:
        return rows[:, TEXT:]

    def with_update(self, rows: Tensor, update: Tensor) -> Tensor:
        return rows + F.pad(update, (0, 0, TEXT, 0))

    def finish(self, rows: Tensor, video: int) -> Tensor:
        return super().finish(rows, video)[:, TEXT:]


class SingleCat(Single):
    """HunyuanVideo's single blocks: both parts concatenated again."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = F.layer_norm(heads(x), (HEAD_DIM,))
        return torch.cat([x[:, :, :TEXT], turned(x[:, :, TEXT:], angle)], dim=2)


class Dual(Rotary):
    """HunyuanVideo: [video, text], each through projections of its own; text joins after the rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.text_q, self.text_k, self.text_v, self.text_o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        angle = angles(x.shape[1], x.dtype)
        q, k, v = turned(heads(self.q(x)), angle), turned(heads(self.k(x)), angle), heads(self.v(x))
        more = (heads(projection(text)) for projection in (self.text_q, self.text_k, self.text_v))
        q, k, v = (torch.cat([one, other], dim=2) for one, other in zip((q, k, v), more, strict=True))
        out = self.attend(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.o(out[:, : x.shape[1]]) + self.text_o(out[:, x.shape[1] :]).mean(1, keepdim=True)
        return result

    def before(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        more = (heads(projection(text)) for projection in (self.text_q, self.text_k, self.text_v))
        pairs = zip(super().before(x), more, strict=True)
        return tuple(torch.cat(pair, dim=2) for pair in pairs)  # type: ignore[return-value]

    def rotated(self, x: Tensor) -> Tensor:
        video = x.shape[2] - TEXT
        return torch.cat([turned(x[:, :, :video], angles(video, x.dtype)), x[:, :, video:]], dim=2)

    def video_rows(self, rows: Tensor, video: int) -> Tensor:
        return rows[:, :video]

    def with_update(self, rows: Tensor, update: Tensor) -> Tensor:
        return rows + F.pad(update, (0, 0, 0, TEXT))

    def finish(self, rows: Tensor, video: int) -> Tensor:
        result: Tensor = self.o(rows[:, :video]) + self.text_o(rows[:, video:]).mean(1, keepdim=True)
        return result


# ---------------------------------------------------------------- what is no position, or cannot be told


class Plain(Rotary):
    """Nothing between projection and attention."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return heads(x)


class NoTurn(Rotary):
    """A rotation by nothing."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return turned(heads(x), 0 * angle)


class Added(Rotary):
    """Positions are added: phi of the sum is no sum."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return heads(x) + angle.repeat_interleave(2, -1)


class NormedAfter(Rotary):
    """A norm after position, which is not linear."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return F.normalize(turned(heads(x), angle), dim=-1)


class NormedParts(Rotary):
    """Both halves of the channels have a norm of their own: there is no single value before position."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        one, two = (F.rms_norm(part, (HEAD_DIM // 2,)) for part in heads(x).chunk(2, dim=-1))
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], dim=-1)


@torch.library.custom_op("toy::turn", mutates_args=())
def turn(x: Tensor, angle: Tensor) -> Tensor:
    """A fused kernel of somebody's: nothing says that it is linear in x."""
    return turned(x, angle)


@turn.register_fake
def _(x: Tensor, angle: Tensor) -> Tensor:
    return torch.empty_like(x)


turn.register_autograd(lambda ctx, grad: (grad, None))


@torch.library.custom_op("toy::turn_in_place", mutates_args=("x",))
def turn_in_place(x: Tensor, angle: Tensor) -> None:
    """The same, written over x: the name does not tell, the schema does."""
    x.copy_(turned(x, angle))


class Fused(Rotary):
    """An operator that is not known."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return turn(heads(x), angle)


class FusedInPlace(Rotary):
    """An operator that is not known and answers nothing."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = heads(x).contiguous()
        turn_in_place(x, angle)
        return x


class Unseen(Rotary):
    """Rotated by what no function mode and no graph sees, such as a kernel behind an autograd function."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = heads(x).contiguous()
        with torch._C.DisableTorchFunction():
            x.copy_(turned(x, angle))
        return x


class Registers(Rotary):
    """The first token is replaced by a learned one, after position."""

    def __init__(self) -> None:
        super().__init__()
        self.register = nn.Parameter(torch.ones(1, HEADS, 1, HEAD_DIM))

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = turned(heads(x), angle)
        return torch.cat([self.register.expand(x.shape[0], -1, -1, -1), x[:, :, 1:]], dim=2)
