import pytest
from provenance import provenance


@pytest.mark.parametrize(
    ("preloaded", "recorded"),
    [
        ("/usr/lib/libother.so.1", None),
        ("/usr/lib/libjemalloc.so.2", "libjemalloc.so.2"),
        ("/usr/lib/libother.so.1:/usr/lib/libtcmalloc.so.4", "libother.so.1 libtcmalloc.so.4"),
    ],
)
def test_rows_name_the_allocator(monkeypatch, preloaded, recorded):
    # Set in this process, where the loader has long been through: nothing is preloaded.
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    monkeypatch.delenv("MALLOC_CONF", raising=False)
    assert provenance("cpu").get("malloc", {}).get("LD_PRELOAD") == recorded
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:-1")
    assert provenance("cpu")["malloc"]["MALLOC_CONF"] == "dirty_decay_ms:-1"
