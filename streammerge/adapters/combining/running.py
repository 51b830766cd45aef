"""A planned combination as a job that makes an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge.adapters.combining.combinations import COMBINATIONS
from streammerge.adapters.combining.config import render_config
from streammerge.adapters.combining.executing import Decompose, check_equal_copies, execute
from streammerge.adapters.combining.plans import (
    CombinationPlan,
    CopyTask,
    ModuleTask,
    OutputTensor,
)
from streammerge.adapters.combining.writing import Meter
from streammerge.adapters.files.config import CONFIG_NAME
from streammerge.adapters.files.types import Naming
from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.digests import FileDigest
from streammerge.checkpoint.hub import hub_revision
from streammerge.checkpoint.manifest import (
    MANIFEST_VERSION,
    Manifest,
    TensorRecord,
    digest_recipe,
)
from streammerge.checkpoint.modelcard import render_model_card
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.outputform import OutputForm
from streammerge.checkpoint.types import ShardFile
from streammerge.storage.copies import origin_of
from streammerge.version import VERSION


@dataclass(frozen=True, slots=True)
class CombinationJob:
    """See :class:`streammerge.adapters.combining.writing.AdapterJob`."""

    plan: CombinationPlan
    """What :func:`~streammerge.adapters.combining.planning.plan_combination` returned."""
    decompose: Decompose
    """Decomposes whole products, where the plan says."""
    device_peak: Callable[[], int]
    """Returns the most memory that the process had of any one device."""

    @property
    def inputs(self) -> Sequence[Path]:
        """The adapters."""
        return [adapter.path for adapter in self.plan.adapters]

    @property
    def files(self) -> Sequence[ShardFile]:
        """Their files."""
        return self.plan.files

    @property
    def file_name(self) -> str:
        """The output's one file with tensors."""
        return self.plan.file_name

    @property
    def header(self) -> bytes:
        """Its bytes before the first tensor."""
        return self.plan.header

    @property
    def outputs(self) -> Sequence[OutputTensor]:
        """Its tensors."""
        return self.plan.outputs

    def check(self, sources: Sequence[ByteSource]) -> None:
        """Raise if sources replace a tensor of the base by different ones."""
        check_equal_copies(self.plan, sources)

    def execute(
        self, sources: Sequence[ByteSource], output: OutputFile, on_task: Callable[[int, int], None]
    ) -> None:
        """Write every tensor."""
        execute(self.plan, sources, output, on_task, self.decompose)

    def texts(self, form: OutputForm) -> Mapping[str, bytes]:
        """Return recipe, configuration and model card."""
        plan, combination = self.plan, COMBINATIONS[self.plan.method]
        texts = {form.recipe: plan.recipe.encode()}
        if plan.config is not None:
            texts[CONFIG_NAME] = render_config(plan.config)
        is_peft = plan.adapters[0].naming is Naming.PEFT
        if form.card is not None:
            texts[form.card] = render_model_card(
                title=form.out.name,
                method=combination.name,
                summary=combination.summary,
                reference=combination.reference,
                recipe_yaml=plan.recipe,
                models=[
                    *[
                        (f"sources[{i}]", origin_of(each.path))
                        for i, each in enumerate(plan.adapters)
                    ],
                    *_base_rows(plan),
                ],
                library_name="peft" if is_peft else None,
                version=VERSION,
            ).encode()
        return texts

    def manifest(
        self, meter: Meter, files: dict[str, FileDigest], identity: str, byte_source: str
    ) -> Manifest:
        """Return the record of the combination."""
        plan = self.plan
        return Manifest(
            version=MANIFEST_VERSION,
            method=plan.method,
            semantics=plan.semantics,
            recipe=plan.recipe,
            recipe_digest=digest_recipe(plan.recipe),
            inputs=plan.files,
            files=files,
            dropped=plan.dropped,
            copied_from_base=(),
            tensors=_tensor_records(plan),
            run=replace(
                meter.record(
                    workers=1,
                    projected=plan.peak_memory,
                    budget=plan.budget,
                    identity=identity,
                    byte_source=byte_source,
                ),
                device=plan.device_name,
                projected_device_memory=0 if plan.device is None else plan.device.peak,
                measured_device_memory=self.device_peak(),
            ),
            revisions={
                f"sources[{index}]": revision
                for index, adapter in enumerate(plan.adapters)
                if (revision := hub_revision(adapter.path)) is not None
            },
        )


def _base_rows(plan: CombinationPlan) -> list[tuple[str, str]]:
    base = None if plan.config is None else plan.config["base_model_name_or_path"]
    return [("base", base)] if isinstance(base, str) else []


def _tensor_records(plan: CombinationPlan) -> dict[str, TensorRecord]:
    records = {}
    for task in plan.tasks:
        action = "merge"
        if isinstance(task, CopyTask):
            action = "copy" if len(task.inputs) == 1 else "copy if equal"
        elif isinstance(task, ModuleTask) and task.copies is not None:
            action = "copy"
        for tensor in task.outputs:
            records[tensor.name] = TensorRecord(
                action=action,
                dtype=tensor.dtype.value,
                numel=tensor.numel,
                density=(),
                thresholds=(),
                numbers=(),
                not_finite=0,
            )
    return dict(sorted(records.items()))
