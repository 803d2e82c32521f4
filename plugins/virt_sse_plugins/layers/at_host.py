"""Encryption at host: a VM's host caches and temporary disks are encrypted, too."""

from __future__ import annotations

import dataclasses

from virt_sse.api import (
    AES_256_XTS,
    PLATFORM_KEY,
    DekSpec,
    GuestNode,
    HostCache,
    HostCaching,
    HostLayer,
    LayerPlan,
    PolicyError,
)


class AtHostLayer(HostLayer):
    """Host caches next to the image, below all LUKS nodes; temporary disks under the platform's key."""

    name = "at-host"

    def cache(self, plan: LayerPlan, caching: HostCaching) -> LayerPlan:
        if caching is HostCaching.NONE:
            return plan
        if not isinstance(plan.stages[0], GuestNode):
            raise PolicyError(
                "no host caching with placement storage: the storage daemon opens the image itself",
                hint="host caching 'None', or placement 'guest'",
            )
        return dataclasses.replace(plan, stages=(*plan.stages, HostCache(caching)))

    def temporary_disk(self) -> LayerPlan:
        return LayerPlan(
            deks=(DekSpec("temp", PLATFORM_KEY, AES_256_XTS),),
            stages=(GuestNode("temp"),),
        )
