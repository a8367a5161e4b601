"""save_pictures(model, inputs, directory): block masks, recall and gates as PNG, and one HTML page with all of them.

matplotlib is needed for this alone. Figures are drawn on canvases of their own: no window opens, and nobody's pyplot
state is touched.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salad_compile.analysis.diagnosis import Detail, Diagnosis, SiteDiagnosis, diagnose_call
from salad_compile.analysis.forwards import converted_branches, forward_inputs, run_observed
from salad_compile.analysis.site_call import SiteCall
from salad_compile.common.files import write_at_once
from salad_compile.common.paths import as_directory
from salad_compile.common.progress import ProgressBar
from salad_compile.common.reports import Report
from salad_compile.errors import MissingPackageError
from salad_compile.grid.sizes import Grid
from salad_compile.kernels.layout import ALL_BLOCKS, block_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from salad_compile.sites.branch import SaladBranch

PAGE = "index.html"
HEADS_IN_A_ROW = 6
FRAMES_IN_A_ROW = 8
ANNOTATED_HEADS = 24  # more have no room for numbers
SHARP_BLOCKS = 220  # about as many pixels as a mask has: with more blocks some would not be drawn
COLOURS = 256  # of a picture's palette, which makes files much smaller
EMPTY, COMPUTED = "#eef0f3", "#17406d"


@dataclass
class _SiteView:
    """What is drawn of one site: the first sample of the first forward.

    mask: bool (H, Mq, Mk), the blocks that are computed. gate: (V,), the mean over heads, or None without one.
    """

    mask: Tensor
    gate: Tensor | None
    grid: Grid | None
    labels: tuple[str, ...]  # of the heads, where they are not alike
    text: str


@dataclass
class _Collected:
    calls: list[SiteDiagnosis] = field(default_factory=list)
    views: dict[str, _SiteView] = field(default_factory=dict)

    def look(self, step: int, call: SiteCall) -> None:
        self.calls.append(diagnose_call(call, step))
        self.views.setdefault(call.branch.record.owner, _view(call))


def save_pictures(model: Any, inputs: Any, directory: str | os.PathLike[str], about: str = "") -> Path:
    """Draw what a converted model attends to on your inputs, and write it into a directory.

    - `masks_<site>.png`: for each head the blocks that are computed, in the token order of the site.
    - `recall.png`: share of the dense softmax mass in those blocks, site by head.
    - `gate.png`: the gate over the video's tokens, frame by frame where the token grid is known; its colours always
      stand for 0 to 1.
    - `index.html`: all of them and the tables of :func:`salad_compile.diagnose`, in one file that needs no other, under
      the sparsity that was asked for and the share of blocks that these inputs leave out.

    Masks and gates are of the first sample of the first inputs, recall and tables of all. Files of the same names are
    replaced, each at once, when everything is drawn.

    Args:
        model, inputs: see :func:`diagnose`. directory: made if it is not there. about: a line for the head of the page,
            for example the SALAD file and what the inputs were.

    Returns:
        The path of the page.

    Raises:
        MissingPackageError: matplotlib is not installed. NotConvertedError, ConfigError, InputsError: see
            :func:`diagnose`. OSError: a file cannot be written.
    """
    _require_matplotlib()
    target = as_directory(directory)
    bare, found = converted_branches(model, "save_pictures")
    collected = _Collected()
    run_observed(bare, forward_inputs(bare, inputs), collected.look, "pictures")
    diagnosis = Diagnosis(tuple(collected.calls))
    figures = {"recall.png": _recall_figure(diagnosis)}
    if any(view.gate is not None for view in collected.views.values()):
        figures["gate.png"] = _gate_figure(collected.views)
    for name, view in collected.views.items():
        figures[f"masks_{_file_name(name)}.png"] = _mask_figure(name, view, diagnosis.sites[name])
    images = {}
    with ProgressBar("drawing", len(figures)) as bar:
        for name, figure in figures.items():
            images[name] = _png(figure)
            bar.advance()
    target.mkdir(parents=True, exist_ok=True)
    lines = [each for each in (about, _sparsity(found, collected.views.values())) if each]
    page = _page(type(bare).__name__, lines, diagnosis, images).encode()
    for name, content in {**images, PAGE: page}.items():
        with write_at_once(target / name) as temporary:
            temporary.write_bytes(content)
    return target / PAGE


def _sparsity(converted: Iterable[SaladBranch], views: Iterable[_SiteView]) -> str:
    asked = sorted({branch.target_sparsity for branch in converted})
    left_out = [1 - float(view.mask.float().mean()) for view in views]
    span = f"{asked[0]:g}" if len(asked) == 1 else f"{asked[0]:g} to {asked[-1]:g}, by site"
    return (
        f"Sparsity asked for: {span}. Blocks that these inputs leave out: {sum(left_out) / len(left_out):.1%} on "
        f"average, {min(left_out):.1%} to {max(left_out):.1%} by site."
    )


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "pictures need matplotlib, which is not installed: pip install 'salad-compile[pictures]'. "
            "salad_compile.diagnose gives the numbers without it."
        ) from error


def _view(call: SiteCall) -> _SiteView:
    sparse, gate, branch = call.sparse(), call.gate(), call.branch
    tokens = call.given.key.shape[2]
    lut, count = sparse.lut[0].long(), sparse.count[0]
    heads, query_blocks, slots = lut.shape
    key_blocks = block_count(tokens, call.spec.key_block)
    listed = torch.arange(slots, device=lut.device) < count[..., None]
    # the column behind the last takes what is not listed
    mask = torch.zeros(heads, query_blocks, key_blocks + 1, dtype=torch.bool, device=lut.device)
    mask.scatter_(-1, torch.where(listed, lut, key_blocks), True)
    mask = mask[..., :key_blocks] | (count == ALL_BLOCKS)[..., None]
    grid = branch.grid.size if branch.grid is not None and branch.record.on_grid else None
    return _SiteView(
        mask=mask.cpu(),
        gate=None if gate is None else gate[0].float().mean(dim=-1).cpu(),
        grid=grid,
        labels=branch.pattern.head_labels(branch.tensors()),
        text=call.given.side,
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _mask_figure(name: str, view: _SiteView, calls: list[SiteDiagnosis]) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap

    heads, query_blocks, key_blocks = view.mask.shape
    columns = min(heads, HEADS_IN_A_ROW)
    lines = -(-heads // columns)
    figure = _figure(max(2.3 * columns, 4.2), 2.5 * lines + 0.5)
    colours = LinearSegmentedColormap.from_list("blocks", [EMPTY, COMPUTED])
    share = float(view.mask.float().mean())
    orders = "; each head in its own order of the tokens" if view.labels else ""
    figure.suptitle(f"{name or 'model'}: {share:.1%} of the blocks are computed{orders}", fontsize=10)
    interpolation = "nearest" if key_blocks <= SHARP_BLOCKS else "antialiased"
    for head in range(heads):
        axes = figure.add_subplot(lines, columns, head + 1)
        image = view.mask[head].float().numpy()
        axes.imshow(image, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation=interpolation)
        recall = sum(call.heads[head].recall for call in calls) / len(calls)
        kind = f", {view.labels[head]}" if view.labels else ""
        axes.set_title(f"head {head}{kind}: recall {recall:.2f}", fontsize=8)
        _plain_ticks(axes)
        if head % columns == 0:
            axes.set_ylabel(f"{query_blocks} query blocks", fontsize=8)
        if head + columns >= heads:
            axes.set_xlabel(f"{key_blocks} key blocks", fontsize=8)
    return figure


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=7, length=2)


def _recall_figure(diagnosis: Diagnosis) -> Figure:
    sites = diagnosis.sites
    heads = max(len(calls[0].heads) for calls in sites.values())
    values = torch.full((len(sites), heads), float("nan"))
    for line, calls in enumerate(sites.values()):
        for head in range(len(calls[0].heads)):
            values[line, head] = sum(call.heads[head].recall for call in calls) / len(calls)
    longest = max(len(name) for name in sites)
    figure = _figure(max(0.42 * heads, 2.2) + 0.075 * longest + 1.2, max(0.26 * len(sites), 0.8) + 1.0)
    axes = figure.add_subplot()
    image = axes.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(sites)), [name or "model" for name in sites], fontsize=7)
    axes.set_xticks(range(heads), [str(head) for head in range(heads)], fontsize=7)
    axes.tick_params(length=0)
    axes.set_xlabel("head", fontsize=8)
    axes.set_title("recall: share of dense attention", fontsize=9, loc="left")
    if heads <= ANNOTATED_HEADS:
        for line, row in enumerate(values.tolist()):
            for head, value in enumerate(row):
                if value == value:  # the other heads of a wider site are NaN
                    colour = "white" if value < 0.6 else "black"
                    axes.text(head, line, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, fraction=0.06, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _gate_figure(views: Mapping[str, _SiteView]) -> Figure:
    gated = {name: view.gate for name, view in views.items() if view.gate is not None}
    frames = [_frames(views[name], gate) for name, gate in gated.items()]
    columns = max(len(line) for line in frames)
    tall, wide = frames[0][0][1].shape
    panel = (1.25, 1.25 * min(max(tall / wide, 0.3), 1.4)) if tall > 1 else (6.0, 0.45)
    figure = _figure(max(panel[0] * columns + 1.6, 4.2), (panel[1] + 0.28) * len(frames) + 0.7)
    figure.suptitle("gate of the linear branch, token by token: 0 is closed, 1 is open", fontsize=10)
    grid = figure.subplots(len(frames), columns, squeeze=False)
    image = None
    for line, (name, parts) in enumerate(zip(gated, frames, strict=True)):
        for column in range(columns):
            axes = grid[line][column]
            axes.set_xticks([])
            axes.set_yticks([])
            if column >= len(parts):
                axes.set_axis_off()
                continue
            label, picture = parts[column]
            aspect = "equal" if len(picture) > 1 else "auto"
            image = axes.imshow(picture.numpy(), cmap="magma", vmin=0, vmax=1, aspect=aspect)
            if line == len(frames) - 1:
                axes.set_xlabel(label, fontsize=7)
            if column == 0:
                axes.set_title(name or "model", fontsize=8, loc="left")
    assert image is not None
    figure.colorbar(image, ax=grid.ravel().tolist(), fraction=0.04, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _frames(view: _SiteView, gate: Tensor) -> list[tuple[str, Tensor]]:
    """The gate as pictures (H, W) of frames spread over the video, or as one line of tokens without a grid."""
    if view.grid is None:
        return [("tokens in their order", gate[None])]
    count = view.grid[0]
    shown = min(count, FRAMES_IN_A_ROW)
    chosen = sorted({round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)})
    pictures = gate.view(view.grid)
    return [(f"frame {frame}", pictures[frame]) for frame in chosen]


def _png(figure: Figure) -> bytes:
    from PIL import Image  # comes with matplotlib

    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)
    return small.getvalue()


# --- files -----------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c2126; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .2rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1px solid #889; }
tbody tr:nth-child(even) { background: #f3f5f8; } img { max-width: 100%; } figure { margin: 1.5rem 0; }
.wide { overflow-x: auto; }
"""


def _page(model: str, about: Sequence[str], diagnosis: Diagnosis, images: Mapping[str, bytes]) -> str:
    pictures = [
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        "</figure>"
        for name, content in images.items()
    ]
    several = len({call.step for call in diagnosis.calls}) > 1
    details: list[tuple[Detail, str]] = [("head", "Each head")]
    if several:
        details.append(("step", "Each forward"))
    tables = [
        f"<details><summary>{title}</summary>{_table(diagnosis.by(detail))}</details>" for detail, title in details
    ]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in diagnosis.notes())
    head = "".join(f"<p>{html.escape(line)}</p>" for line in about)
    title = f"SALAD attention of {html.escape(model)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1>{head}{_table(diagnosis)}{notes}{''.join(tables)}"
        "<p>Masks and gates: the first sample of the first inputs. Masks are in the order in which the blocks take the "
        f"tokens.</p>{''.join(pictures)}</body></html>\n"
    )


def _table(report: Report) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in report.columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in report.rows())
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _file_name(site: str) -> str:
    return re.sub(r"[^\w.-]", "_", site) or "model"
