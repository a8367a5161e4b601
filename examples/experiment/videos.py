"""Procedural videos that need local detail and long-range memory; each clip is a function of (seed, index) alone.

A clip shows, in pixels of [-1, 1]:

* a background of random cells. The camera pans over it and comes back, so cells that leave the picture return, and the
  content of a patch is found at another place in another frame;
* a sprite with a random texture that passes behind a bar and reappears with the same texture, and another one in front;
* light that changes over time in the whole frame.

The label says the shape of the sprites. Random numbers are integer hashes without a generator's state: they are
the same on every device, and need no loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PATCH = 4  # pixels: the camera moves by whole patches of the model, sprites by pixels
CELL = 2  # pixels of one random cell of a texture
SHAPES = ("square", "disc", "diamond", "ring", "plus", "triangle", "cross", "stripes")
COLOURS = 3
_MASK = 0xFFFFFFFF

# amplitudes; a pixel adds up one of each at most, so that the sum stays within [-1, 1]
_BASE, _FINE, _COARSE, _SPRITE, _LIGHT = 0.3, 0.25, 0.3, 0.55, 0.15


@dataclass(frozen=True)
class ClipSize:
    """Frames, and pixels of an edge; the edge is a multiple of 16."""

    frames: int = 16
    edge: int = 64

    def __post_init__(self) -> None:
        if self.frames < 2 or self.edge < 16 or self.edge % 16:
            raise ValueError(f"a clip has 2 frames or more and an edge that is a multiple of 16, got {self}")


class Clips(NamedTuple):
    """What :func:`draw` returns.

    video: fp32 (B, 3, T, S, S). labels: int64 (B,), index into SHAPES. passing: int64 (B, T, S, S), where the sprite
    that passes behind the bar is seen, the position in its texture, elsewhere -1. light: fp32 (B, T, 3).
    """

    video: Tensor
    labels: Tensor
    passing: Tensor
    light: Tensor


def draw(seed: int, indices: Tensor, size: ClipSize) -> Clips:
    """The clips of these indices.

    Args:
        seed: of the set; sets of different seeds share no clip.
        indices: int64 (B,), 0 or more; the clips are made on its device.
    """
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ValueError(f"indices is int64 (B,), got {indices.dtype} {tuple(indices.shape)}")
    key = _mix(_mix(torch.full_like(indices, seed & _MASK)) ^ (indices * 0x9E3779B1 & _MASK))
    batch, frames, edge = len(indices), size.frames, size.edge
    time = torch.arange(frames, device=indices.device)
    labels = (_uniform(key, 0, 1)[:, 0] * len(SHAPES)).long()

    picture = _background(key, time, edge)
    bar, upright = _bar(key, edge)
    along = torch.arange(edge, device=indices.device)
    rows, columns = along[:, None].expand(edge, edge), along.expand(edge, edge)

    top, left = _behind_the_bar(key, time, edge, bar, upright)
    passing, picture = _paste(picture, key, 30, labels, top, left, rows, columns)
    across = torch.where(upright[:, None, None], columns, rows)  # (B, S, S), the coordinate that the bar interrupts
    hidden = ((across - bar[:, None, None]).abs() * 2 <= _bar_width(edge))[:, None].expand(batch, frames, edge, edge)
    colour = _BASE * (2 * _uniform(key, 20, COLOURS) - 1)
    picture = torch.where(hidden.unsqueeze(-1), colour[:, None, None, None], picture)
    passing = passing.masked_fill(hidden, -1)

    top, left = _bouncing(key, time, edge)
    in_front, picture = _paste(picture, key, 40, labels, top, left, rows, columns)
    passing = passing.masked_fill(in_front >= 0, -1)

    light = _light(key, time)
    picture = picture + light[:, :, None, None]
    return Clips(picture.permute(0, 4, 1, 2, 3).contiguous(), labels, passing, light)


# ---------------------------------------------------------------- random numbers


def _mix(x: Tensor) -> Tensor:
    """An integer hash of 32 bits, kept in int64; no product exceeds 63 bits."""
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    return x ^ (x >> 16)


def _hash(key: Tensor, stream: int, counter: Tensor) -> Tensor:
    """32 random bits in int64, of the shape of `counter`, int64 (B or 1, ...); `key` is int64 (B,)."""
    key = _mix(key ^ _mix(torch.full_like(key, stream)))
    return _mix(_mix(counter & _MASK) ^ key.view(-1, *[1] * (counter.ndim - 1)))


def _uniform(key: Tensor, stream: int, count: int) -> Tensor:
    """fp32 (B, count) in [0, 1)."""
    return (_hash(key, stream, torch.arange(count, device=key.device)[None]) >> 8).float() / 2**24


# ---------------------------------------------------------------- the parts of a picture


def _texture(key: Tensor, stream: int, row: Tensor, column: Tensor) -> Tensor:
    """fp32 (B, ..., 3) in [-1, 1): random colours of the cells at int64 coordinates (B or 1, ...)."""
    bits = _hash(key, stream, (row & 0xFFFF) * 65_536 + (column & 0xFFFF))
    shifts = torch.arange(COLOURS, device=key.device) * 10 + 2  # ten bits for each colour
    return ((bits.unsqueeze(-1) >> shifts) & 1023).float() / 512 - 1


def _camera(key: Tensor, time: Tensor) -> Tensor:
    """int64 (B, T, 2): rows and columns of the camera in pixels. It pans, turns about half way, and comes back."""
    frames = len(time)
    chance = _uniform(key, 1, 3)
    turn = (frames / 2 + (chance[:, :1] - 0.5) * frames / 4).floor()
    rate = torch.where(chance[:, 1:2] < 0.5, 0.5, 1.0)  # patches for each frame
    steps = ((turn - (time - turn).abs()) * rate).floor().long()
    eighth = (chance[:, 2] * 8).long() * 45  # degrees; a table would have to be copied to the GPU
    angle = torch.deg2rad(eighth.float())
    direction = torch.stack([angle.sin(), angle.cos()], dim=-1).mul(1.5).round().long()
    return PATCH * steps[..., None] * direction[:, None]


def _background(key: Tensor, time: Tensor, edge: int) -> Tensor:
    """fp32 (B, T, S, S, 3): the cells that the camera sees, in a fine and a coarse grid."""
    cells = torch.arange(edge // CELL, device=key.device)
    camera = _camera(key, time) // CELL
    row = (camera[..., 0, None] + cells)[..., :, None]  # (B, T, cells, 1)
    column = (camera[..., 1, None] + cells)[..., None, :]
    base = _BASE * (2 * _uniform(key, 2, COLOURS) - 1)
    picture = base[:, None, None, None] + _FINE * _texture(key, 3, row, column)
    picture = picture + _COARSE * _texture(key, 4, row // 4, column // 4)
    return picture.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)


def _sprite_edge(edge: int) -> int:
    return edge * 3 // 16


def _bar_width(edge: int) -> int:
    """Wider than a sprite and its step, so that the sprite is hidden for at least one frame."""
    return edge * 5 // 16


def _bar(key: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """int64 (B,), the middle of the bar, and bool (B,), whether it is upright."""
    chance = _uniform(key, 21, 2)
    return ((0.4 + 0.2 * chance[:, 0]) * edge).long(), chance[:, 1] < 0.5


def _behind_the_bar(key: Tensor, time: Tensor, edge: int, bar: Tensor, upright: Tensor) -> tuple[Tensor, Tensor]:
    """int64 (B, T) twice: top and left of the sprite that crosses the bar."""
    chance, frames = _uniform(key, 22, 4), len(time)
    middle = (frames - 1) / 2 + (chance[:, :1] - 0.5) * frames / 8
    speed = edge / frames * (0.75 + 0.25 * chance[:, 1:2]) * torch.where(chance[:, 2:3] < 0.5, -1.0, 1.0)
    across = (bar[:, None] + speed * (time - middle)).floor().long() - _sprite_edge(edge) // 2
    beside = (chance[:, 3:4] * (edge - _sprite_edge(edge))).long().expand_as(across)
    return torch.where(upright[:, None], beside, across), torch.where(upright[:, None], across, beside)


def _bouncing(key: Tensor, time: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """int64 (B, T) twice: top and left of the sprite in front, which bounces off the edges of the picture."""
    chance, room = _uniform(key, 23, 4), edge - _sprite_edge(edge)
    speed = (chance[:, :2] - 0.5) * edge / len(time) * 1.5
    way = (chance[:, 2:] * room)[:, None] + speed[:, None] * time[:, None]  # (B, T, 2)
    place = (room - (way.remainder(2 * room) - room).abs()).floor().long().clamp(0, room)
    return place[..., 0], place[..., 1]


def _paste(
    picture: Tensor,
    key: Tensor,
    stream: int,
    labels: Tensor,
    top: Tensor,
    left: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw one sprite.

    Returns:
        int64 (B, T, S, S), the position in the sprite's texture or -1, and the picture (B, T, S, S, 3).
    """
    size = _sprite_edge(picture.shape[2])
    row, column = rows - top[..., None, None], columns - left[..., None, None]
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    place = (row * size + column).clamp(0, size * size - 1)
    outlines = _outlines(size, key.device)
    inside = inside & outlines[labels].gather(1, place.flatten(1)).view_as(inside)
    own = torch.arange(size, device=key.device) // CELL
    base = _BASE * (2 * _uniform(key, stream, COLOURS) - 1)
    texture = base[:, None, None] + _SPRITE * _texture(key, stream + 1, own[None, :, None], own[None, None])
    colours = texture.flatten(1, 2)  # (B, size * size, 3)
    shown = colours.gather(1, place.flatten(1).unsqueeze(-1).expand(-1, -1, COLOURS)).view_as(picture)
    return torch.where(inside, place, -1), torch.where(inside.unsqueeze(-1), shown, picture)


def _outlines(size: int, device: torch.device) -> Tensor:
    """bool (shapes, size * size)."""
    x = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    row, column = x[:, None].expand(size, size), x.expand(size, size)
    radius = row.square() + column.square()
    outlines = [
        torch.ones_like(row, dtype=torch.bool),
        radius <= 1,
        row.abs() + column.abs() <= 1,
        (radius <= 1) & (radius >= 0.25),
        (row.abs() <= 0.4) | (column.abs() <= 0.4),
        column.abs() * 2 <= row + 1,
        (row - column).abs().minimum((row + column).abs()) <= 0.5,
        (torch.arange(size, device=device) // 2 % 2 == 0)[:, None].expand(size, size),
    ]
    return torch.stack(outlines).flatten(1)


def _light(key: Tensor, time: Tensor) -> Tensor:
    """fp32 (B, T, 3): a slow change of light, the same in the whole frame."""
    chance = _uniform(key, 24, 2 * COLOURS).view(-1, 1, 2, COLOURS)
    phase = chance[:, :, 0] + (0.5 + chance[:, :, 1]) * (time[:, None] / len(time))
    return _LIGHT * torch.sin(2 * math.pi * phase)
