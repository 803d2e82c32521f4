from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from virt_sse.config import Config
from virt_sse.domains.domain_records import DomainRecords
from virt_sse.domains.pause_locks import pause_locks
from virt_sse.domains.state_records import Phase, StateRecord, forget_used, state_records
from virt_sse.errors import VmStateError

DOMAIN, DISK, OTHER = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()


@pytest.fixture
def config(root: Path) -> Config:
    return Config.load(root)


@pytest.fixture
def records(config: Config) -> DomainRecords[StateRecord]:
    return state_records(config)


def record(phase: Phase) -> StateRecord:
    return StateRecord(
        id=str(uuid.uuid4()), path=Path("/state"), phase=phase, is_running=True, disks=(str(DISK),)
    )


@pytest.mark.parametrize(("domain", "disks"), [(DOMAIN, []), (OTHER, [DISK])])
@pytest.mark.parametrize("phase", Phase)
def test_a_use_of_domain_or_disk_makes_a_state_void(
    config: Config,
    records: DomainRecords[StateRecord],
    phase: Phase,
    domain: uuid.UUID,
    disks: list[uuid.UUID],
) -> None:
    records.put(DOMAIN, made := record(phase))
    forget_used(config, OTHER, [OTHER])
    assert records.get(DOMAIN) == made
    forget_used(config, domain, disks)
    assert records.get(DOMAIN) is None


def test_the_start_of_a_restored_domain_keeps_its_state(
    config: Config, records: DomainRecords[StateRecord]
) -> None:
    records.put(DOMAIN, made := record(Phase.RESTORING))
    with pause_locks(config).hold(DOMAIN):
        forget_used(config, DOMAIN, [DISK])
    assert dict(records.all()) == {DOMAIN: made}


def test_a_damaged_record_continues_no_domain(records: DomainRecords[StateRecord], config: Config) -> None:
    records.put(DOMAIN, record(Phase.SAVED))
    (config.saved_states / f"{DOMAIN}.json").write_text("{}")
    (config.saved_states / "notes.json").write_text("{}")
    assert dict(records.all()) == {}
    with pytest.raises(VmStateError, match="cannot read"):
        records.get(DOMAIN)
