"""The store's tables in their current schema. See the migrations for earlier schemas."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
)

metadata = MetaData()

encryption_sets = Table(
    "encryption_sets",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("key_provider", String(64), nullable=False),
    Column("key_name", Text, nullable=False),
    Column("key_version", String(64)),
    Column("encryption_type", String(64), nullable=False),
    Column("automatic_rotation", Boolean, nullable=False),
    Column("subscription", String(64), nullable=False),
    Column("region", String(64), nullable=False),
    Column("tenant", String(64)),
    Column("identity", String(64)),
    Column("revocation", String(16), nullable=False),
    Column("grace_seconds", Integer, nullable=False),
    Column("created", String(40), nullable=False),
    Column("placement", String(16)),
)

disks = Table(
    "disks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("path", Text, nullable=False, unique=True),
    Column("format", String(16), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("encryption_type", String(64), nullable=False),
    Column("created", String(40), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("sku", String(32), nullable=False, server_default="Premium_LRS"),
    Column("encryption_set_id", Uuid, ForeignKey("encryption_sets.id")),
    Column("caching", String(16), nullable=False, server_default="None"),
    Column("kind", String(16), nullable=False, server_default="disk"),
    Column("source_id", Uuid),
    Column("point", Uuid),
    Column("origin_id", Uuid),
    Column("serial", String(80)),
    Column("base_id", Uuid),
    Column("deleted", Text),
    Column("scheduled_purge", Text),
    Column("path_number", BigInteger, nullable=False, server_default="0"),
    Index("disks_by_encryption_set", "encryption_set_id"),
    Index("disks_by_state", "state"),
    Index("disks_by_source", "source_id"),
    Index("disks_by_origin", "origin_id"),
    Index("disks_by_base", "base_id"),
    Index("disks_by_path_number", "path_number"),
)
"""``path_number`` counts the additions and moves of images in the store, in the order of their commits."""

counters = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""The last number given out of each series."""

certificates = Table(
    "certificates",
    metadata,
    Column("disk_id", Uuid, primary_key=True),
    Column("name", String(80), nullable=False),
    Column("document", Text, nullable=False),
    Column("issued", String(40)),
)

scale_sets = Table(
    "scale_sets",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("definition", Text, nullable=False),
    Column("image_id", Uuid, nullable=False),
    Column("size", Integer, nullable=False),
    Column("encryption_at_host", Boolean, nullable=False),
    Column("created", String(40), nullable=False),
    Column("is_deleting", Boolean, nullable=False),
)

scale_set_instances = Table(
    "scale_set_instances",
    metadata,
    Column("set_id", Uuid, ForeignKey("scale_sets.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("domain_id", Uuid, nullable=False),
    Column("disk_id", Uuid, nullable=False),
    Column("encryption_at_host", Boolean, nullable=False),
)

wrapped_deks = Table(
    "wrapped_deks",
    metadata,
    Column("disk_id", Uuid, ForeignKey("disks.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("slot", String(32), nullable=False),
    Column("cipher", String(64), nullable=False),
    Column("algorithm", String(32), nullable=False),
    Column("ciphertext", LargeBinary, nullable=False),
    Column("key_provider", String(64), nullable=False),
    Column("key_name", Text, nullable=False),
    Column("key_version", String(64), nullable=False),
    Index("wrapped_deks_by_key", "key_provider", "key_name", "key_version"),
)

vms = Table(
    "vms",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("host", Uuid, nullable=False),
    Column("encryption_at_host", Boolean, nullable=False),
    Column("size", String(64)),
    Column("temp_disk_size", BigInteger),
    Column("generation", Integer, nullable=False),
    Column("pending", Text),
    Column("tpm_algorithm", String(32)),
    Column("tpm_ciphertext", LargeBinary),
    Column("tpm_key_provider", String(64)),
    Column("tpm_key_name", Text),
    Column("tpm_key_version", String(64)),
)

copies = Table(
    "copies",
    metadata,
    Column("disk_id", Uuid, primary_key=True),
    Column("name", String(80), nullable=False),
    Column("source_id", Uuid),
    Column("source_path", Text),
    Column("source_device", BigInteger),
    Column("source_inode", BigInteger),
    Column("final_path", Text),
    Column("domain_id", Uuid),
    Column("target", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("is_detached", Boolean, nullable=False),
    Column("is_cancelled", Boolean, nullable=False),
    Column("max_rate", BigInteger),
)

hosts = Table(
    "hosts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", String(255), nullable=False),
    Column("boot_id", Uuid, nullable=False),
    Column("seen", BigInteger, nullable=False),
    Column("fenced", BigInteger),
)
"""Hosts with a store in common. Times are in seconds since 1970, by the clock of the database."""

leases = Table(
    "leases",
    metadata,
    Column("resource_id", Uuid, primary_key=True),
    Column("host_id", Uuid, ForeignKey("hosts.id"), nullable=False),
    Index("leases_by_host", "host_id"),
)
"""The host that alone may use a disk or run a VM, by the id of the disk or VM."""

lease_users = Table(
    "lease_users",
    metadata,
    Column("resource_id", Uuid, ForeignKey("leases.resource_id", ondelete="CASCADE"), primary_key=True),
    Column("user_id", Uuid, primary_key=True),
    Column("since", BigInteger, nullable=False),
    Index("lease_users_by_user", "user_id"),
)
"""What a lease is for: a domain, or work of commands under the id of the host."""

lease_handovers = Table(
    "lease_handovers",
    metadata,
    Column("resource_id", Uuid, ForeignKey("leases.resource_id", ondelete="CASCADE"), primary_key=True),
    Column("host_id", Uuid, ForeignKey("hosts.id"), nullable=False),
    Column("since", BigInteger, nullable=False),
)
"""The host that gets a lease once its holder gives the lease back: the destination of a live migration.

Meanwhile the lease has one user, the domain.
"""
protected_domains = Table(
    "protected_domains",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("host_id", Uuid, ForeignKey("hosts.id"), nullable=False),
    Column("definition", Text, nullable=False),
    Column("is_autostarted", Boolean, nullable=False),
    Column("seal", LargeBinary, nullable=False),
    Column("evacuation", String(16), nullable=False),
    Index("protected_domains_by_host", "host_id"),
)
"""Domains that another host can take over, with their definitions."""
