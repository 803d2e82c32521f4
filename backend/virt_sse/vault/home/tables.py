"""The vault's tables. Secrets in them are sealed."""

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
    UniqueConstraint,
    text,
)

metadata = MetaData()

number = Integer().with_variant(BigInteger(), "postgresql")
"""Of 64 bits, also on PostgreSQL: seconds since 1970, and exponents of RSA keys."""

key_name = String(127).with_variant(String(127, collation="C"), "postgresql")
"""Names sort as in SQLite."""

keys = Table(
    "keys",
    metadata,
    Column("name", key_name, primary_key=True),
    Column("deleted", number),
    Column("purge", number),
    Column("policy", Text),
    Index("keys_by_lower_name", text("lower(name)"), unique=True),
)
"""Two keys never differ in the case of their names alone."""

versions = Table(
    "versions",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("name", key_name, ForeignKey("keys.name", ondelete="CASCADE"), nullable=False),
    Column("version", String(32), nullable=False),
    Column("key_type", String(16), nullable=False),
    Column("n", LargeBinary, nullable=False),
    Column("e", number, nullable=False),
    Column("operations", Text, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("not_before", number),
    Column("expires", number),
    Column("created", number, nullable=False),
    Column("updated", number, nullable=False),
    Column("tags", Text, nullable=False),
    Column("stored", LargeBinary, nullable=False),
    UniqueConstraint("name", "version"),
    sqlite_autoincrement=True,
)

leftovers = Table(
    "leftovers",
    metadata,
    Column("name", key_name, primary_key=True),
    Column("version", String(32), primary_key=True),
    Column("key_type", String(16), nullable=False),
    Column("announced", number),
)
"""Versions without a row in ``versions`` whose material may exist outside the database, in an HSM token. A
row is written before the material is made, with the time; and in the transaction that deletes a version,
without a time."""

changes = Table("changes", metadata, Column("number", number))
"""One row: how many changes the instances of a vault have made. Each change locks the row."""

principals = Table(
    "principals",
    metadata,
    Column("client_id", String(36), primary_key=True),
    Column("object_id", String(36), nullable=False, unique=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("public_key", Text, nullable=False),
    Column("role", String(32), nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("expires", number),
    Column("created", number, nullable=False),
    Column("created_by", String(36)),
)

permissions = Table(
    "permissions",
    metadata,
    Column("client_id", String(36), ForeignKey("principals.client_id", ondelete="CASCADE"), primary_key=True),
    Column("permission", String(32), primary_key=True),
)

key_permissions = Table(
    "key_permissions",
    metadata,
    Column("client_id", String(36), ForeignKey("principals.client_id", ondelete="CASCADE"), primary_key=True),
    Column("key", key_name, primary_key=True),
    Column("permission", String(32), primary_key=True),
    Index("key_permissions_by_key", "key"),
)
"""Permissions on a single key, by its name in lower case; they end with the key."""

assertions = Table(
    "assertions",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("expires", number, nullable=False),
    Index("assertions_by_expiry", "expires"),
)

sealed_secrets = Table(
    "sealed_secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
)
