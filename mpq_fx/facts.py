"""The frozen records that flow between the stages; no behavior beyond derived facts.

capture -> Site      propose -> Choice      measure -> Table      allocate -> Plan      lower -> Row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mpq_fx.plan import Difference

Scaling = Literal["none", "static", "dynamic"]


@dataclass(frozen=True, order=True)
class Choice:
    """Numerics of one unit: weight format × activation format × when its scale is known ×
    transforms.

    `weight` and `activation` are names in `mpq_fx.formats.FORMATS`.  `scaling` is "none" for a
    float activation, "static" for a scale fixed by calibration, "dynamic" for one computed on every
    call.
    """

    weight: str
    activation: str
    scaling: Scaling = "none"
    transforms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The only spelling, in configs, plans, reports: "bfloat16", "int8*int8_tensor/static"."""
        core = self.weight if self.weight == self.activation else f"{self.weight}*{self.activation}"
        core += "" if self.scaling == "none" else f"/{self.scaling}"
        return "+".join((core, *self.transforms))

    def __str__(self) -> str:
        return self.name


FLOAT32 = Choice("float32", "float32")
BFLOAT16 = Choice("bfloat16", "bfloat16")


@dataclass(frozen=True)
class Site:
    """One op of the canonical graph that may run in another precision."""

    name: str  # unique within a model: the qualified name of the weight's owner
    # linear | conv | matmul | grouped_matmul | attention | embedding | residual, and what no target
    # has a choice for: conv3d | conv_transpose
    op: str
    node: str  # name of the node in the canonical graph
    weight: str | None = None  # placeholder that holds the float weight, as float values
    bias: str | None = None
    input_shape: tuple[Any, ...] = ()  # of the activation; ints, or strings for symbolic sizes
    weight_shape: tuple[int, ...] = ()
    output_shape: tuple[Any, ...] = ()
    attributes: tuple[Any, ...] = ()  # of a convolution: stride, padding, dilation, groups
    dtype: str = "float32"  # what the user's model computes this site in
    macs: int = 0  # multiply-accumulates of one call, at the calibrated shape
    group: str | None = None  # sites that read the same tensor (q/k/v) share this key
    path: str = ""  # module path, as a user would write it
    source: str = ""  # "model.py:31", the user's line

    @property
    def weight_numel(self) -> int:
        numel = 1
        for size in self.weight_shape:
            numel *= size
        return numel if self.weight_shape else 0


@dataclass(frozen=True)
class Table:
    """Error (or cost) of (unit, choice), with optional sparse pair terms, and where it came from.

    `values[unit, choice]` are noise powers (squared relative RMS) when `measure` is "noise_power":
    they add over units.  Negative or noisy values are kept as measured.
    """

    metric: str
    measure: str  # "noise_power" | "ms" | "bytes" | ...
    values: Mapping[tuple[str, str], float]
    pairs: Mapping[tuple[str, str, str, str], float] = field(default_factory=dict)
    spread: Mapping[tuple[str, str], float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)  # samples, passes, seconds, weights
    others: tuple[Table, ...] = ()  # of the same, by other metrics: their plans are worth a look


@dataclass(frozen=True)
class Value:
    """What one op makes: its bytes in the user's precision, and the sites that decide on it."""

    bytes: int
    itemsize: int
    deciding: tuple[str, ...] = ()  # of these the format is, if they agree; none: the user's own


Live = tuple[Value, ...]  # what is in memory at one op


SYNTHETIC = "synthetic"  # key of a plan's provenance: its calibration inputs, if nobody's data
# What the numbers of a table depend on: "model", "data", … -> name -> digest, or words.
Identity = Mapping[str, Mapping[str, str]]

INDUCTOR = "inductor float"  # the user's own graph, compiled as without mpq


@dataclass(frozen=True)
class Row:
    """One line of the ledger: a site, what became of it, and why."""

    site: Site
    choice: str
    reason: str = ""  # why not quantized / why this choice
    refusals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # choice -> reasons
    kernel: str = ""  # the callee in the final graph
    mode: str = ""  # how the target compiled the graph of this site, or INDUCTOR
    activation: Mapping[str, float] = field(default_factory=dict)  # what it reads, in calibration
    predicted_error: float | None = None  # relative RMS at the graph's outputs, this site alone
    ms_before: float | None = None
    ms_after: float | None = None
    weight_bytes: int = 0


@dataclass(frozen=True)
class SolverFacts:
    """What the solver proved: objective value, best bound, relative gap."""

    status: str  # OPTIMAL | FEASIBLE
    objective: tuple[str, ...]
    value: float
    bound: float
    gap: float
    seconds: float
    scale: Mapping[str, float] = field(default_factory=dict)  # integer units per float unit


@dataclass(frozen=True)
class Plan:
    """(unit) -> choice, with the budgets, tables and measurements that led there.  A file: see
    plan.py.
    """

    choices: Mapping[str, Choice]
    ledger: tuple[Row, ...]
    target: str
    error: float | None = None  # relative RMS on the report part, measured
    tolerance: float | None = None  # what was allowed, as a number
    latency_ms: Mapping[str, float] = field(default_factory=dict)  # variant -> measured median
    errors: Mapping[str, float] = field(default_factory=dict)  # variant -> measured error
    activation_bytes: Mapping[str, float] = field(default_factory=dict)  # variant -> peak of a call
    winner: str = "plan"  # the variant that was installed, and why in `notes`
    objective: str = "latency"
    budgets: Mapping[str, float] = field(default_factory=dict)  # tolerance, max_latency, … numbers
    baseline: Mapping[str, float] = field(default_factory=dict)  # latency, size, … of float, whole
    tables: Mapping[str, Table] = field(default_factory=dict)  # error, latency, size, bits, bops
    ties: tuple[tuple[str, ...], ...] = ()  # sites that share a choice
    live: tuple[Live, ...] = ()  # values between ops, where they may be the peak
    error_scale: float = 1.0  # predicted error budget / tolerance², found by bisection
    solver: SolverFacts | None = None
    points: tuple[Mapping[str, Any], ...] = ()  # of the frontier of error and latency
    timings: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds
    fingerprint: Mapping[str, Any] = field(default_factory=dict)  # of the model: sites and shapes
    provenance: Mapping[str, Any] = field(default_factory=dict)  # versions, device, instruction set
    notes: tuple[str, ...] = ()  # what was cut short, excluded, or surprising
    tensors: Mapping[str, Any] = field(default_factory=dict)  # static scales, codes if kept

    @property
    def without_data(self) -> str:
        """The note on calibration inputs that were made up; "" if all were real."""
        return self.provenance.get(SYNTHETIC, {}).get("note", "")

    def save(self, path: str | Path) -> None:
        """Write `path` (JSON), and tensors beside it as safetensors."""
        import_module("mpq_fx.plan").save(self, path)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan that `save` wrote; PlanError for any other file."""
        return import_module("mpq_fx.plan").load(path)

    def resolve(self, **wishes: Any) -> Plan:
        """Solve again without data: objective, tolerance, max_latency, max_size, max_bits,
        min_bits, max_bops, max_activation_memory.
        """
        return import_module("mpq_fx.resolve").resolve(self, **wishes)

    def frontier(self, resource: str = "latency", points: int = 9) -> tuple[dict[str, Any], ...]:
        """Trade-offs of `resource` against error that no other plan improves on, from the
        tables.
        """
        return import_module("mpq_fx.resolve").frontier(self, resource, points)

    def with_codes(self, model: Any) -> Plan:
        """This plan with the model's weights as codes, so that it can fill a meta-device model."""
        return import_module("mpq_fx.codes").attach(self, model)

    def diff(self, other: Plan) -> Difference:
        """What is not the same in `other`; str() for people."""
        return import_module("mpq_fx.plan").diff(self, other)
