"""Not yet."""

def test_a(host):
    assert host
