"""`ferry tune`: measure the grids and the intervals of guidance for a line's champion; ferry.toml is changed by hand."""

from __future__ import annotations

from pydantic import Field

from flows import progress
from flows.errors import WorkspaceError
from flows.retrain import incumbent_of
from flows.settings import Line
from flows.steps import open_dataset, pull_data
from flows.workspace import Workspace
from model import features, tuning
from model.config import ConfigurationName, VariantName
from model.drawing import Drawer
from model.evaluate import Drawn
from model.scorecard import Frozen, Quality, Sampler
from model.train import load_checkpoint
from registry.catalog import Subject
from registry.selection import Limits, margin, quantile

TINY = 1e-9  # a margin of 0 lets nothing pass


class GuidedRow(Frozen):
    """An interval of guidance: what it costs, and how far its images may be worse."""

    low: float
    high: float
    evaluations: int
    used: float = Field(
        description="largest part of the gate's margin that the upper bound of its loss takes, over all spaces; below 1 it is not worse"
    )


class Tuned(Frozen):
    """What was measured for a configuration of a line, and the settings that follow."""

    subject: str
    version: int
    grids: dict[VariantName, list[tuning.Grid]]
    chosen: dict[VariantName, Sampler]
    guidance: list[GuidedRow]
    interval: tuple[float, float] | None = Field(description="cheapest interval that is shown to be no worse; null: none is")

    @property
    def text(self) -> str:
        """The figures as tables, and the lines for ferry.toml."""
        lines = [f"{self.subject} version {self.version}"]
        for variant, rows in self.grids.items():
            first = rows[0].sampler
            lines += [
                "", f"{variant}, {first.steps} steps ({first.evaluations} evaluations), {tuning.GRID_IMAGES} images",
                f"{'shift':>7}  {'distance from the converged images':36}minus that of the even grid",
                *(
                    f"{row.sampler.shift:7.2f}  {f'{row.distance:.4f} ± {1.96 * row.distance_se:.4f}':36}{row.delta:+.4f} ± {1.96 * row.se:.4f}"
                    for row in rows
                ),
            ]  # fmt: skip
        lines += ["", f"{'guided at times':18}{'evaluations':>13}  part of the margin that the bound of its loss takes"]
        lines += [f"{f'{row.low:g} to {row.high:g}':18}{row.evaluations:13d}  {row.used:.2f}" for row in self.guidance]
        lines += [
            "",
            "to use what was found, write these keys into ferry.toml, below the header that is there (add the header only if there is none),",
            "in place of keys of the same name; then run `ferry retrain`, which lets the gate judge it:",
        ]
        limits = "" if self.interval is None else f"guidance_low = {self.interval[0]:g}\nguidance_high = {self.interval[1]:g}"
        name = self.subject.partition("/")[0]
        if limits:
            lines += ["", f"below [lines.{name}.sampler]:", limits]
        if any(sampler.shift != 1 for sampler in self.chosen.values()):
            lines += ["", f"below [lines.{name}.samplers]:"]
            lines += [f"{variant} = {_toml(sampler)}" for variant, sampler in self.chosen.items() if sampler.shift != 1]
        elif not limits:
            lines[-2:] = ["nothing was shown to be better than the present settings"]
        return "\n".join(lines)


def _toml(sampler: Sampler) -> str:
    """Write a sampler as an inline table."""
    return f"{{ {', '.join(f'{key} = {value!r}' for key, value in sampler.model_dump().items())} }}".replace("'", '"')


def tune(workspace: Workspace, line: str, configuration: ConfigurationName | None, images: int) -> Tuned:
    """Measure the champion `full` of a line.

    Args:
        workspace: where.
        line: whose champion.
        configuration: of the champion; None: the only one.
        images: images for each interval of guidance.

    Raises:
        WorkspaceError: there is no such line, it has several configurations and none is named, or no champion.
    """
    settings = workspace.line(line)
    known = list(settings.ladders())
    if configuration is None and len(known) > 1:
        raise WorkspaceError(f"line {line} has the configurations {' and '.join(known)}; name one with --configuration")
    chosen = configuration or known[0]
    if chosen not in known:
        raise WorkspaceError(f"line {line} has no class of configuration {chosen}; it has {' and '.join(known)}")
    subject = Subject(line=line, configuration=chosen, variant="full")
    champion = incumbent_of(workspace, subject)
    if champion is None:
        raise WorkspaceError(f"{subject} has no champion to measure; run `ferry retrain {line}`")
    data = load_checkpoint(champion.files.checkpoint).lineage.data
    pull_data.fn(workspace, data)
    dataset = open_dataset(workspace, settings, chosen, data)

    def draw(sampler: Sampler, captions: list[str]) -> Drawn:
        told = f"draw {subject} in {sampler.evaluations} evaluations"
        return Drawer(
            champion.files.bundle, workspace.work / "draws", sampler, lambda _, done, total: progress.advance(told, done, total)
        ).draw(captions)

    plain = settings.sampler.model_copy(update={"guidance_low": 0.0, "guidance_high": 1.0, "shift": 1.0})
    grids = {variant: tuning.grids(draw, dataset, _of(settings, variant, plain)) for variant in _drawn_by_full(settings)}
    rows: list[GuidedRow] = []
    if plain.guidance != 1:
        spaces = features.load(workspace.feature_spaces(line))
        found, beside = tuning.intervals(draw, dataset, spaces, _of(settings, "dev", plain), images)
        limits = Limits(**settings.gate.model_dump(exclude={"images"}))
        rows = [_row(guided, beside, limits) for guided in found]
    fit = [row for row in rows if row.used < 1]
    cheapest = min(fit, key=lambda row: (row.evaluations, row.used), default=None)
    interval = (cheapest.low, cheapest.high) if cheapest else None
    return Tuned(
        subject=str(subject), version=champion.seal.version, grids=grids,
        chosen={variant: _guided(tuning.best_grid(rows).sampler, interval) for variant, rows in grids.items()}, guidance=rows,
        interval=interval,
    )  # fmt: skip


def _drawn_by_full(settings: Line) -> list[VariantName]:
    """List the variants whose weights are those of `full`, without `full` itself, whose many steps no grid improves."""
    listed = {variant for device_class in settings.classes.values() for variant in device_class.variants}
    tables: tuple[VariantName, ...] = ("dev", "fast")
    return [variant for variant in tables if variant in listed and settings.sources(variant)[0] == "table"] or list(tables)


def _of(settings: Line, variant: VariantName, plain: Sampler) -> Sampler:
    """Return the sampler of a variant, on an even grid and guided everywhere."""
    return plain.model_copy(update={"steps": settings.sampler_of(variant, "table").steps})


def _guided(sampler: Sampler, interval: tuple[float, float] | None) -> Sampler:
    """Give a variant's sampler the interval that `full` gets: a variant with a line of its own takes nothing from that of `full`."""
    return sampler.model_copy(update={"guidance_low": interval[0], "guidance_high": interval[1]}) if interval else sampler


def _row(guided: tuning.Guided, beside: list[Quality], limits: Limits) -> GuidedRow:
    used = [
        (row.delta + quantile(row.groups, limits.alpha) * row.se) / max(margin(beside, row, limits), TINY)
        for row in guided.comparisons
    ]
    way = guided.sampler
    return GuidedRow(low=way.guidance_low, high=way.guidance_high, evaluations=way.evaluations, used=round(max(used), 4))
