"""Which NPU is here, may it be opened, who holds it. No Celery, no Redis, no runtime."""
