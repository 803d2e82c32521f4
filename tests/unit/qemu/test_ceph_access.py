from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from virt_sse.errors import ConfigError, InvalidValueError
from virt_sse.model.ceph import CephCluster
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import check_path
from virt_sse.qemu import ceph, image_file
from virt_sse.qemu.unlocking import image_options
from virt_sse.system.rbd_names import RbdName

KEY = "QVFEMTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3OA=="


@pytest.fixture
def keyring(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "keyring"
    other = f"[client.other]\n\tkey = {KEY[::-1]}\n"
    path.write_text(f"{other}[client.virt-sse]\n\tkey = {KEY}\n\tcaps mon = x\n")
    path.chmod(0o600)
    ceph.use(CephCluster((("10.0.0.1", 3300), ("fd00::2", 3300)), "virt-sse", path))
    yield path
    ceph.use(None)


@pytest.mark.parametrize(
    "text",
    ["rbd:pool", "rbd:pool/", "rbd:/image", "rbd:a/b/c", "rbd:a/b@snap", "rbd:a/b:conf=/x", "rbd:a/b,c"],
)
def test_malformed_names_of_images_are_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid RBD image"):
        check_path(Path(text))


def test_a_name_is_the_same_as_a_path_in_a_definition_and_for_qemu(keyring: Path) -> None:
    path = check_path(Path("rbd:vms/web-01"))
    assert str(path) == "rbd:vms/web-01"
    assert RbdName.of(path).path == path
    node = image_file.file_node(path, 2)
    assert (node["pool"], node["image"], node["key-secret"]) == ("vms", "web-01", "ceph2")
    options = image_options(path, DiskFormat.RAW, 1, first_secret=2).split(",")
    assert options[:2] == ["driver=luks", "key-secret=dek2"]
    assert {"file.driver=rbd", "file.server.1.host=fd00::2", "file.key-secret=ceph2"} < set(options)
    assert KEY not in str(node) + str(options) + repr(ceph.cluster())


def test_the_key_is_the_users_and_readable_by_root_alone(keyring: Path) -> None:
    assert ceph.user_key() == KEY.encode()
    keyring.chmod(0o640)
    with pytest.raises(ConfigError, match="other users may read"):
        ceph.user_key()
    keyring.chmod(0o600)
    for content in ("[client.other]\nkey = a\n", f"key = {KEY}\n", "[client.virt-sse]\nkey = not base64\n"):
        keyring.write_text(content)
        with pytest.raises(ConfigError, match=r"has no key of client\.virt-sse"):
            ceph.user_key()
    keyring.unlink()
    with pytest.raises(ConfigError, match="cannot read the Ceph keyring"):
        ceph.user_key()


def test_without_a_cluster_no_image_is_opened() -> None:
    with (
        pytest.raises(ConfigError, match="no Ceph cluster is configured"),
        image_file.opened(Path("rbd:a/b")),
    ):
        pass
