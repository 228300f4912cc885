"""What a person who watches a fleet notices."""


def test_x(host):
    assert True
