"""What the loading warps and the multiplying warps both work out: which tile, which list, which blocks of it.

A list is read from its end. The one block that can be short is its last, and so is the entry without a partner where
their number is odd: both fall in the first step, the only one that hides columns.
"""

from collections import namedtuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# lut (B, H, Mq, K), count (B, H, Mq); redo: see `claim`; mask (B, ceil(S / 64)) int64, a bit for each key, or None;
# tiles = Mq; items: tiles to compute; slots = K; tokens = S; pools = P
Lists = namedtuple("Lists", ["lut", "count", "redo", "mask", "tiles", "heads", "items", "slots", "tokens", "pools"])


@gluon.jit
def tile_of(lists, item, C: gl.constexpr):
    """The tile to compute as the item-th: its row of lut and count. All tiles of one head are neighbours."""
    if C.repair:
        return gl.load(lists.redo + 1 + item)
    else:  # noqa: RET505 - Triton compiles one of the two
        return item


@gluon.jit
def place_of(lists, tile):
    """The tile's number within its head, its head, and its batch entry."""
    head = tile // lists.tiles
    return tile % lists.tiles, head % lists.heads, head // lists.heads


@gluon.jit
def list_of(lists, tile, C: gl.constexpr):
    """First entry of a tile's list, its length, whether it is all blocks unlisted (a negative count), and its steps.

    An empty list has one step, in which nothing is visible.
    """
    count = gl.load(lists.count + tile)
    everything = count < 0
    length = gl.where(everything, (lists.tokens + 63) // 64, gl.minimum(count, lists.slots))
    steps = gl.maximum((length + C.entries - 1) // C.entries, 1)
    return lists.lut + tile.to(gl.int64) * lists.slots, length, everything, steps


@gluon.jit
def first_key(row, entry, length, everything):
    """First key of an entry of a list. Beyond the end of the list: of the last entry, which columns then hide."""
    entry = gl.maximum(gl.minimum(entry, length - 1), 0)
    return gl.where(everything, entry, gl.load(row + entry, mask=everything == 0, other=0)) * 64


@gluon.jit
def mask_bits(lists, batch, row, entry, length, everything, C: gl.constexpr):
    """For the key blocks of a step: which of their 64 keys the mask keeps. None of a block that does not exist."""
    if C.masked:
        words = (lists.tokens + 63) // 64
        mask = lists.mask + batch.to(gl.int64) * words
        first = first_key(row, entry, length, everything) // 64
        second = first_key(row, entry + C.entries - 1, length, everything) // 64
        first_bits = gl.load(mask + first, mask=(first >= 0) & (first < words), other=0)
        return first_bits, gl.load(mask + second, mask=(second >= 0) & (second < words), other=0)
    else:  # noqa: RET505
        return 0, 0


@gluon.jit
def pool_steps(lists, everything, C: gl.constexpr):
    """Steps of pools after those of a list; none after one of all blocks, which leaves nothing out."""
    if C.pooled:
        return gl.where(everything, 0, (lists.pools + C.step - 1) // C.step)
    else:  # noqa: RET505
        return 0


@gluon.jit
def following(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and its phase: it turns over where the ring begins again."""
    if SLOTS == 1:
        return slot, phase ^ 1
    else:  # noqa: RET505
        slot += 1
        return gl.where(slot == SLOTS, 0, slot), gl.where(slot == SLOTS, phase ^ 1, phase)


@gluon.jit
def claim(lists, tile, total):
    """Put a tile on the list of those to redo, once: redo[0] counts them, then follow their numbers, then marks.

    The order of the list is chance; what is computed for a tile is not.
    """
    if gl.atomic_add(lists.redo + 1 + total + tile, 1) == 0:
        gl.store(lists.redo + 1 + gl.atomic_add(lists.redo, 1), tile)
