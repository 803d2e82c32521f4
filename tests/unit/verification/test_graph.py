"""Block graphs as QEMU 7.2 describes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from virt_sse.errors import MonitorError
from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.verification.chains import LinkKind
from virt_sse.verification.graph import BlockGraph, Exposure, Place, cipher_of, place_of
from virt_sse.verification.running_disks import RunningDisks
from virt_sse.verification.verdict import DiskVerdict, Layer

LUKS = {"format": "luks", "cipher-alg": "aes-256", "cipher-mode": "xts", "ivgen-alg": "plain64"}
DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"


def node(name: str, driver: str, file: str = "json:{}", **encrypt: str) -> dict[str, Any]:
    data = {} if not encrypt else encrypt if driver == "luks" else {"encrypt": encrypt}
    image = {"format-specific": {"type": driver, "data": data}} if driver in ("luks", "qcow2") else {}
    return {"node-name": name, "drv": driver, "file": file, "image": image, "encrypted": bool(encrypt)}


class Graph:
    """A guest's device on ``top``; edges as ``parent:name:child``."""

    def __init__(self, nodes: list[dict[str, Any]], edges: str, **more: Any) -> None:
        pairs = [edge.split(":") for edge in edges.split()]
        kinds = {node["node-name"]: "block-driver" for node in nodes} | {DEVICE: "block-backend"}
        kinds |= {
            name: "block-job" for each in pairs for name in (each[0], each[2]) if name.startswith("job")
        }
        ids = {name: number for number, name in enumerate(kinds, start=1)}
        pairs = [[parent.replace("device", DEVICE), name, child] for parent, name, child in pairs]
        graph = {
            "nodes": [{"id": ids[name], "name": name, "type": kind} for name, kind in kinds.items()],
            "edges": [{"parent": ids[p], "name": name, "child": ids[child]} for p, name, child in pairs],
        }
        self.graph = BlockGraph(nodes, graph, **more)

    def exposures(self, file: str = "/ours") -> list[Exposure]:
        (stored,) = (v for v in self.graph.stored() if v.place and v.place.path == Path(file))
        ((volume,),) = self.graph.volumes_over(stored)
        assert volume.cipher == "aes-256-xts"
        return self.graph.exposures(volume)


OURS = [node("ours", "qcow2", **LUKS), node("file", "file", "/ours")]
PLAIN = [node("other", "qcow2"), node("otherfile", "file", "/other")]


def test_the_graph_of_an_ordinary_disk_has_no_plaintext_link() -> None:
    graph = Graph(OURS, "device:root:ours ours:file:file")
    assert graph.exposures() == []
    ((alias, root),) = graph.graph.devices()
    assert (alias, root.name) == ("virtio-disk0", "ours")
    assert graph.graph.devices_over(root) == ["virtio-disk0"]
    assert graph.graph.exports(root) == []


@pytest.mark.parametrize(
    ("edges", "kind"),
    [
        ("device:root:other other:backing:ours", LinkKind.OVERLAY),
        ("device:root:ours ours:backing:other", LinkKind.BACKING),
        ("device:root:top top:backing:ours job:source:ours job:target:other job:x:top", LinkKind.MIRROR),
        ("device:root:cbw cbw:file:ours cbw:target:other other:backing:ours", LinkKind.BACKUP),
        ("device:root:ours job-backup:source:ours job-backup:target:other", LinkKind.BACKUP),
    ],
)
def test_plaintext_beside_a_volume_is_found(edges: str, kind: LinkKind) -> None:
    filters = [node("top", "mirror_top"), node("cbw", "copy-before-write")]
    nodes = OURS + PLAIN + [each for each in filters if each["node-name"] in edges]
    jobs = [{"id": "job-backup", "type": "backup"}, {"id": "job", "type": "mirror"}]
    graph = Graph(nodes, f"{edges} ours:file:file other:file:otherfile", jobs=jobs)
    assert graph.exposures() == [Exposure(kind, "/other")]
    (volume,) = graph.graph.volumes_over(next(v for v in graph.graph.stored() if v.name == "file"))[0]
    assert graph.graph.devices_over(volume) == ["virtio-disk0"]


def test_an_encrypted_overlay_is_reported_and_hides_no_plaintext() -> None:
    nodes = [*OURS, node("other", "qcow2", **LUKS), PLAIN[1]]
    edges = "ours:file:file other:file:otherfile other:backing:ours"
    overlay = Exposure(LinkKind.OVERLAY, "/other", "aes-256-xts")
    assert Graph(nodes, f"device:root:other {edges}").exposures() == [overlay]
    nodes += [node("base", "file", "/base")]
    edges += " ours:backing:base"
    exposures = Graph(nodes, f"device:root:other {edges}").exposures()
    assert exposures == [overlay, Exposure(LinkKind.BACKING, "/base")]


SOCKET = Path("/run/virt-sse-disks/x/guest/nbd")
EXPORT = [node("top", "raw"), node("socket", "nbd", f"nbd+unix:///virt-sse:x?socket={SOCKET}")]
CHAIN = DiskChain("vda", "virtio-disk0")


def check_plain(edges: str, *nodes: dict[str, Any], secrets: Sequence[str] = (), **more: Any) -> list[str]:
    """The problems of a disk that is decrypted below QEMU."""
    filters = [node("mirror", "mirror_top")] if "mirror" in edges else []
    graph = Graph([*EXPORT, *nodes, *filters], f"{edges} top:file:socket", **more).graph
    verdict = DiskVerdict("vda")
    RunningDisks(graph, ["masterKey0", *secrets], None).check_plain(verdict, CHAIN, SOCKET)
    return verdict.problems


def test_a_disk_that_is_decrypted_below_qemu_is_at_its_socket_and_nowhere_else() -> None:
    assert check_plain("device:root:top") == []
    assert check_plain("device:root:top", secrets=["other-encryption-secret0"]) == []
    overlay = "device:root:other other:backing:top other:file:otherfile"
    assert check_plain(overlay, *PLAIN) == ["overlay /other is not encrypted"]
    encrypted = [node("other", "qcow2", **LUKS), PLAIN[1]]
    assert check_plain(overlay, *encrypted) == ["overlay /other is encrypted by the guest's QEMU"]
    copy = "device:root:mirror mirror:backing:top job:source:top job:target:other job:x:mirror"
    jobs = [{"id": "job", "type": "mirror"}]
    assert check_plain(f"{copy} other:file:otherfile", *PLAIN, jobs=jobs) == [
        "mirror /other is not encrypted"
    ]
    exports = [{"id": "backup", "node-name": "top"}]
    (problem,) = check_plain("device:root:top", exports=exports)
    assert problem == "plaintext leaves QEMU through the NBD export 'backup'"


def test_a_key_in_qemu_for_such_a_disk_is_found() -> None:
    (problem,) = check_plain("device:root:top", secrets=["top-encryption-secret0"])
    assert problem == f"the guest's QEMU has keys for {SOCKET}: top-encryption-secret0"
    luks = node("luks", "luks", **LUKS)
    assert check_plain("device:root:luks luks:file:top", luks) == [
        f"the guest's device is not connected to {SOCKET}",
        f"the guest's QEMU encrypts the data at {SOCKET} itself",
    ]


def test_a_device_elsewhere_is_found() -> None:
    assert check_plain("device:root:other other:file:otherfile", *PLAIN) == [
        f"the guest's device is not connected to {SOCKET}"
    ]


def test_an_image_open_without_its_layer_is_found() -> None:
    graph = Graph([node("raw", "raw"), node("file", "file", "/ours")], "device:root:raw raw:file:file").graph
    assert [graph.volumes_over(stored) for stored in graph.stored()] == [[()]]


def test_two_layers_in_one_qemu_are_found_in_their_order() -> None:
    nodes = [*OURS, node("outer", "luks", **LUKS)]
    graph = Graph(nodes, "device:root:ours ours:file:outer outer:file:file").graph
    assert [[each.name for each in s] for s in graph.volumes_over(graph.stored()[0])] == [["outer", "ours"]]


def test_exports_of_plaintext_are_found() -> None:
    nodes = [*OURS, node("cbw", "copy-before-write")]
    exports = [{"id": "disk", "node-name": "cbw"}, {"id": "ciphertext", "node-name": "file"}]
    graph = Graph(nodes, "cbw:file:ours ours:file:file", exports=exports).graph
    assert graph.exports(graph.volumes_over(graph.stored()[0])[0][0]) == ["disk"]


def test_the_cipher_of_a_node_is_named() -> None:
    cbc = {"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"}
    assert cipher_of(node("x", "luks", **LUKS)) == "aes-256-xts"
    assert cipher_of(node("x", "qcow2", **LUKS | cbc)) == "aes-256-cbc-essiv:sha256"
    assert cipher_of(node("x", "qcow2", format="aes")) == "aes, not LUKS"
    assert cipher_of(node("x", "qcow2")) is None
    assert cipher_of(node("x", "file")) is None


@pytest.mark.parametrize(
    ("filename", "place"),
    [
        ("/a b", Place("/a b", Path("/a b"))),
        ("nbd+unix:///id?socket=/run/nbd", Place("socket /run/nbd", Path("/run/nbd"))),
        ('json:{"driver": "file", "filename": "/x"}', Place("/x", Path("/x"))),
        ('json:{"driver": "nbd", "server": {"type": "unix", "path": "/s"}}', Place("/s", Path("/s"))),
        ("json:{", Place("json:{")),
        ("json:{}", Place("json:{}")),
        ("rbd:pool/image", Place("rbd:pool/image")),
    ],
)
def test_the_place_of_a_node_is_found(filename: str, place: Place) -> None:
    assert place_of(filename) == place


def test_a_block_graph_of_an_unknown_form_is_refused() -> None:
    with pytest.raises(MonitorError, match="unknown format"):
        BlockGraph([{"node-name": "x"}], {"nodes": [{"id": 1, "name": "x", "type": "block-driver"}]})


@pytest.mark.parametrize(
    "options", ["[]", "1", "null", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"']
)
def test_strange_options_in_a_filename_are_a_place(options: str) -> None:
    assert place_of(f"json:{options}") == Place(f"json:{options}")


def test_an_incremental_copy_leaves_qemu_at_the_socket_of_its_storage_daemon_alone() -> None:
    nodes = [*OURS, node("cbw", "copy-before-write"), EXPORT[1]]
    edges = "device:root:cbw cbw:file:ours cbw:target:socket ours:file:file"
    running = RunningDisks(Graph(nodes, edges).graph, [], None)
    for increments, problems in (
        ([f"socket {SOCKET}"], []),
        (["socket /run/other"], [f"backup socket {SOCKET} is not encrypted"]),
    ):
        verdict = DiskVerdict("vda")
        layer = Layer("guest's QEMU", None)
        running.check_ours(verdict, CHAIN, Path("/ours"), layer, AES_256_XTS, increments=increments)
        assert verdict.problems == problems
