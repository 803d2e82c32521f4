"""An example of each command, for its help text, the reference and the man pages. A test parses each."""

from __future__ import annotations

from collections.abc import Sequence

_EXAMPLES = """
agent page
agent run
agent status --output json
agent units /etc/systemd/system
audit list --since 24h --refused
audit tail -n 20 --follow
audit verify --log /var/lib/virt-sse/vault/audit.jsonl
certificate list
certificate public-key
certificate show web
certificate verify web.certificate --public-key host.pub
completion bash
des create payroll --key https://localhost:8443/keys/payroll --auto-rotation
des delete payroll
des list
des rotate payroll --prove
des show payroll
des update payroll --revocation pause
disk adopt /var/lib/libvirt/images/web.qcow2
disk attach data web --target vdb
disk backup web /mnt/backup --incremental
disk backups --disk web
disk check web
disk copy web web-2 --des payroll
disk create web --size 10G --des payroll
disk delete web --dry-run
disk detach data web
disk erase-backup web-20260131T120000Z --dry-run
disk export web web.qcow2 --plaintext
disk import web debian-12.qcow2 --des payroll
disk inspect web
disk list
disk purge web --dry-run
disk receive web --path /srv/images/web.qcow2
disk recover web
disk reencrypt web --cipher aes-256-xts --max-rate 100M
disk resize web 20G
disk restore /mnt/backup/web-20260131T120000Z.qcow2 web-restored
disk show web
disk trust web
disk update web --des payroll
disk verify-backup /mnt/backup/web-20260131T120000Z.qcow2
disk xml web --target vdb
host capabilities
host doctor
host evacuate host-2 --dry-run
host fence host-2
host hsm create payroll --type rsa --size 3072
host hsm destroy payroll --version 01 --dry-run
host hsm disable payroll
host hsm enable payroll
host hsm import payroll payroll.pem
host hsm init
host hsm list
host hsm status
host hsm unlock --ask-pin
host init
host list
host uninstall --keep-disks --dry-run
image create debian --file debian-12.qcow2
image delete debian:1 --dry-run
image list
image show debian:1
key create payroll --size 3072
key delete payroll
key disable payroll
key enable payroll
key import payroll payroll.pem
key list
key purge payroll --dry-run
key recover payroll
key rewrap --provider platform-managed
key rotate payroll
key rotation-policy payroll --every P90D
key show payroll
key used
key versions payroll
snapshot create before-upgrade --domain web
snapshot delete before-upgrade-vda --dry-run
snapshot list --disk web
snapshot restore before-upgrade-vda web-restored
snapshot show before-upgrade-vda
store backup /mnt/backup/store.sqlite
store migrate postgresql://virt-sse@db.example.org/virt-sse
store restore /mnt/backup/store.sqlite
vault access list
vault access remove host-1
vault access set host-1 use
vault backup /mnt/backup/vault.sqlite
vault export-root root.export --recipient vault-2.pem
vault hsm add --hsm-uri pkcs11:token=vault --hsm-pin-file /etc/virt-sse/pin
vault hsm unlock
vault import-root root.export --identity vault-2.key --host vault-2.example.org
vault init --name payroll --host vault.example.org
vault principal create auditor --file auditor.json --role auditor
vault principal delete auditor
vault principal disable host-1
vault principal enable host-1
vault principal list
vault rescue admin-2 --file admin-2.json
vault restore /mnt/backup/vault.sqlite
vault seal-root --seal-uri 'pkcs11:token=vault;object=root' --seal-pin-file /etc/virt-sse/pin --new-seal-key
vault serve --host 0.0.0.0
vault status
vault unseal-root
vm create web.xml --disk new:web,size=10G,des=payroll --start
vm encrypt web --des payroll
vm inspect web
vm list
vm protect web
vm restore /var/lib/virt-sse/web.state
vm save web /var/lib/virt-sse/web.state
vm show web
vm sizes
vm unprotect web
vm update web --encryption-at-host on --temp-disk-size 10G
vm verify web --strict
vmss create farm farm.xml --image debian-disk --instances 3
vmss delete farm
vmss list
vmss scale farm 5
vmss show farm
vmss update farm --encryption-at-host on
"""


def example(path: Sequence[str]) -> str | None:
    """An example of the command called by the words of *path*: the whole line, or ``None``."""
    for line in _EXAMPLES.split("\n"):
        if path and line.split()[: len(path)] == list(path):
            return f"virt-sse {line}"
    return None
