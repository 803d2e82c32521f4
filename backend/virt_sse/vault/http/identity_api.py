"""The vault's management interface: principals and permissions.

``/identity/principals`` and ``/access/policies``; JSON, with Azure's error bodies. Administrators may use all
operations. An identity operator may create principals without permissions, and see and delete its own
creations.
"""

from __future__ import annotations

from collections.abc import Mapping

from virt_sse.vault import properties
from virt_sse.vault.home.settings import Tier
from virt_sse.vault.http.calls import Call, Reply
from virt_sse.vault.identity.principals import Principal, Unchanged
from virt_sse.vault.refusals import Refusal, bad_parameter, forbidden
from virt_sse.vault_client.permissions import Permission, Role


def list_principals(call: Call) -> Reply:
    _require_operator(call)
    shown = [
        p
        for p in call.vault.principals.all()
        if _administers(call) or p.created_by == call.principal.client_id
    ]
    return Reply({"value": [principal_document(p, call.vault.settings.tenant) for p in shown]})


def create_principal(call: Call) -> Reply:
    _require_operator(call)
    document = call.document()
    try:
        role = Role(document.get("role", Role.NONE.value))
    except ValueError:
        raise bad_parameter(f"Property role must be one of {', '.join(r.value for r in Role)}.") from None
    if role is not Role.NONE:
        _require_administrator(call)
    principal = call.vault.principals.create(
        properties.string(document, "name"),
        properties.string(document, "public_key"),
        role=role,
        expires=properties.moment(document, "expires"),
        created_by=call.principal.client_id,
    )
    document = principal_document(principal, call.vault.settings.tenant)
    return Reply(document, 201, subject=f"/identity/principals/{principal.name}")


def get_principal(call: Call) -> Reply:
    return Reply(principal_document(_managed(call), call.vault.settings.tenant))


def change_principal(call: Call) -> Reply:
    _require_administrator(call)
    principal = _managed(call)
    document = call.document()
    enabled = document.get("enabled", Unchanged.UNCHANGED)
    if not isinstance(enabled, bool | Unchanged):
        raise bad_parameter("Property enabled must be true or false.")
    expires = properties.moment(document, "expires") if "expires" in document else Unchanged.UNCHANGED
    changed = call.vault.principals.change(principal, enabled=enabled, expires=expires)
    return Reply(principal_document(changed, call.vault.settings.tenant))


def delete_principal(call: Call) -> Reply:
    call.vault.principals.delete(_managed(call))
    return Reply(None, 204)


def list_policies(call: Call) -> Reply:
    _require_administrator(call)
    return Reply({"value": [_policy(p) for p in call.vault.principals.all()]})


def get_policy(call: Call) -> Reply:
    _require_administrator(call)
    return Reply(_policy(_managed(call)))


def set_policy(call: Call) -> Reply:
    _require_administrator(call)
    document = call.document()
    permissions = _permissions(document, "permissions")
    return Reply(_policy(call.vault.principals.grant(_managed(call), permissions, key=_key(call, document))))


def adjust_policy(call: Call) -> Reply:
    """Add and remove permissions: concurrent changes of other permissions are kept."""
    _require_administrator(call)
    document = {"grant": [], "revoke": []} | call.document()
    changed = call.vault.principals.adjust(
        _managed(call),
        granted=_permissions(document, "grant"),
        revoked=_permissions(document, "revoke"),
        key=_key(call, document),
    )
    return Reply(_policy(changed))


def remove_policy(call: Call) -> Reply:
    _require_administrator(call)
    call.vault.principals.revoke_all(_managed(call))
    return Reply(None, 204)


def status(call: Call) -> Reply:
    """Describe the vault, to any principal."""
    settings = call.vault.settings
    live, deleted = call.vault.keys.count()
    return Reply(
        {
            "name": settings.name,
            "tenant": settings.tenant,
            "tier": settings.tier.value,
            "hsm": _hsm(call),
            "url": settings.url,
            "retention_days": settings.retention_days,
            "purge_protection": settings.purge_protection,
            "keys": live,
            "deleted_keys": deleted,
            "principals": len(call.vault.principals.all()),
        }
    )


def _hsm(call: Call) -> str | None:
    """Describe the state of the vault's HSM; the reason of a failure is for administrators only."""
    hsm = call.vault.hsm
    if hsm is None:
        return "none" if call.vault.settings.tier is Tier.PREMIUM else None
    failure = hsm.failure()
    if failure is None:
        return "available"
    return f"unavailable: {failure}" if _administers(call) else "unavailable"


def principal_document(principal: Principal, tenant: str) -> dict[str, object]:
    """Encode a principal as JSON."""
    return {
        "client_id": principal.client_id,
        "object_id": principal.object_id,
        "tenant": tenant,
        "name": principal.name,
        "role": principal.role.value,
        "enabled": principal.enabled,
        "expires": principal.expires,
        "created": principal.created,
        "created_by": principal.created_by,
    }


def _policy(principal: Principal) -> dict[str, object]:
    return {
        "client_id": principal.client_id,
        "name": principal.name,
        "permissions": _values(principal.permissions),
        "keys": {
            key: _values(granted) for key, granted in sorted(principal.key_permissions.items()) if granted
        },
    }


def _values(permissions: frozenset[Permission]) -> list[str]:
    return [permission.value for permission in Permission if permission in permissions]


def _key(call: Call, document: Mapping[str, object]) -> str | None:
    """The key whose permissions are meant, an existing one; ``None`` for all keys."""
    if document.get("key") is None:
        return None
    return call.vault.keys.existing(properties.string(document, "key"))


def _permissions(document: Mapping[str, object], field: str) -> list[Permission]:
    given = document.get(field)
    try:
        if isinstance(given, list) and all(isinstance(item, str) for item in given):
            return [Permission(item) for item in given]
    except ValueError:
        pass
    raise bad_parameter(f"Property {field} must be a list out of {', '.join(p.value for p in Permission)}.")


def _administers(call: Call) -> bool:
    return call.principal.role is Role.ADMINISTRATOR


def _require_administrator(call: Call) -> None:
    if not _administers(call):
        raise forbidden("The caller must be an administrator of the vault.", "AdministratorRequired")


def _require_operator(call: Call) -> None:
    if call.principal.role is Role.NONE:
        raise forbidden(
            "The caller must be an administrator or an identity operator of the vault.", "OperatorRequired"
        )


def _managed(call: Call) -> Principal:
    """Find the principal in the path; not found, too, if the caller may not manage this principal."""
    _require_operator(call)
    if _administers(call):
        return call.vault.principals.get(call.name)
    found = next(
        (p for p in call.vault.principals.all() if call.name in (p.client_id, p.object_id, p.name)), None
    )
    if found is None or found.created_by != call.principal.client_id:
        raise Refusal(404, "PrincipalNotFound", f"There is no principal {call.name[:128]!r}.")
    return found
