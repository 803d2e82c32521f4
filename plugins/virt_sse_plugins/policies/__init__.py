"""Built-in policies of virt-sse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virt_sse.api import CloudProfile, Operation, Site, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def virt_sse_validate(operation: Operation, site: Site) -> None:
    if site.enforce:
        from virt_sse_plugins.policies import cloud_rules, in_guest_encryption

        cloud_rules.validate(operation, site)
        in_guest_encryption.validate(operation)


@hookimpl
def virt_sse_cloud_profile(site: Site) -> CloudProfile:
    from virt_sse_plugins.policies import cloud_rules

    return cloud_rules.profile(site)


@hookimpl
def virt_sse_add_commands(app: typer.Typer) -> None:
    from virt_sse_plugins.policies.sizes_command import sizes

    for group in app.registered_groups:
        vm = group.typer_instance
        if group.name == "vm" and vm and all(each.name != "sizes" for each in vm.registered_commands):
            vm.command(name="sizes")(sizes)
