"""A third kind of stage process in one module: a pass-through NBD proxy, nbdkit(1) without a filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from virt_sse.model.layers import Stage
from virt_sse.stages.locked_process import Command
from virt_sse.stages.stage_process import ExpectedEvidence, ImageSource, RecordField, StageProcess


@dataclass(frozen=True, slots=True)
class PassThrough(Stage):
    """Stage: a proxy that changes nothing."""


class PassThroughProcess(StageProcess[PassThrough]):
    name = "proxy"
    title = "pass-through proxy"
    stage_type = PassThrough
    record_field = RecordField("pass_through", bool, default=False)
    inner_socket = "proxy"

    @classmethod
    def to_record(cls, stages: Sequence[PassThrough]) -> bool:
        return bool(stages)

    @classmethod
    def from_record(cls, value: object) -> Sequence[PassThrough]:
        return (PassThrough(),) if value else ()

    @property
    def keeps_acknowledged_writes(self) -> bool:
        return True

    def command(self, listening: Sequence[int]) -> Command:
        (served,) = listening
        return Command(["nbdkit", "--foreground", *self._source()], listening=served)

    def evidence(self) -> ExpectedEvidence:
        return ExpectedEvidence(
            data="the proxy's memory",
            arguments={argument: f"the proxy runs without {argument}" for argument in self._source()},
        )

    def _source(self) -> list[str]:
        source = self.place.source
        if isinstance(source, ImageSource):
            return ["file", f"file={source.path}"]
        return ["nbd", f"socket={source.socket}", f"export={source.export}"]
