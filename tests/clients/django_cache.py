# SPDX-License-Identifier: MIT
# Django with django-redis as its cache, in database 1.
import os

import django
from django.conf import settings
from django.core.cache import cache

settings.configure(CACHES={"default": {
    "BACKEND": "django_redis.cache.RedisCache",
    "LOCATION": f"redis://127.0.0.1:{os.environ['PORT']}/1",
}})
django.setup()
print(cache.set("a", {"x": [1, 2]}, 100), cache.get("a"), cache.get("none", "default"))
print(cache.add("a", 1), cache.add("b", 1), cache.incr("b", 4), cache.decr("b"))
cache.set_many({f"k{i}": i for i in range(50)}, timeout=100)
print(sum(cache.get_many([f"k{i}" for i in range(60)]).values()))
print(cache.touch("a", 50), cache.touch("none"), cache.ttl("a") > 40)
cache.set("v", "old", version=1)
print(cache.incr_version("v"), cache.get("v"), cache.get("v", version=2))
print(sorted(cache.iter_keys("k1*")), cache.delete_pattern("k*"), cache.keys("*"))
with cache.lock("lock", timeout=5):
    print(cache.lock("lock", blocking_timeout=0.1).acquire())
print(cache.get_or_set("c", lambda: 7), cache.delete("c"), cache.delete("c"))
print(cache.clear(), cache.get("a"))
