"""What `embedq-worker check` says of a Redis: whether it keeps what is queued."""

from __future__ import annotations

from typing import Any, cast

from redis.exceptions import ResponseError

from embedq.patience import patiently
from embedq.redis_client import open_redis
from embedq.settings import mask_password
from embedq_worker.findings import Finding, Level


def look(url: str) -> Finding:
    """Ask a Redis what it keeps, and where.

    Raises:
        QueueUnavailable: it does not answer.
    """
    client = open_redis(url, connect_timeout_s=2, timeout_s=2)
    shown = mask_password(url)

    def ask() -> tuple[dict[str, Any], dict[str, str]]:
        info = client.info()
        try:
            config = cast(dict[str, str], client.config_get("maxmemory-policy", "appendonly"))
        except ResponseError:  # a managed Redis may not let us ask
            config = {}
        return info, config

    info, config = patiently(ask, patience_s=0, on_wait=lambda _: None, where=shown)
    client.close()
    limit = int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy") or config.get("maxmemory-policy", "unknown")
    detail = (
        f"Redis {info.get('redis_version', 'unknown')} at {shown}, {policy}, "
        f"AOF {'on' if info.get('aof_enabled') else 'off'}, "
        f"{int(info.get('used_memory', 0)) / 1e6:,.0f} of "
        f"{f'{limit / 1e6:,.0f}' if limit else 'unlimited'} MB used"
    )
    if policy not in ("noeviction", "unknown"):
        mend = "It may evict batches: CONFIG SET maxmemory-policy noeviction."
        return detail, Level.RED, mend
    if not info.get("aof_enabled"):
        return detail, Level.WARN, "A restart loses what is queued: CONFIG SET appendonly yes."
    if not limit:
        return detail, Level.WARN, "It may take all memory of its host: CONFIG SET maxmemory 2gb."
    return detail, Level.OK, ""
