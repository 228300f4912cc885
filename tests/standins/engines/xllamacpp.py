"""Parameters as llama.cpp's binding has them: attributes that check their type."""


class Part:
    """A group of parameters."""

    __slots__ = ("path",)
    path: str


class CommonParams:
    """A few of llama.cpp's parameters."""

    __slots__ = ("hostnames", "model", "n_ctx", "n_parallel", "port")

    def __init__(self) -> None:
        """Start with the defaults."""
        self.model, self.n_ctx = Part(), 0
        self.n_parallel, self.port, self.hostnames = 1, 8080, ["127.0.0.1"]
        self.model.path = ""

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse a text where a number belongs, as Cython does."""
        if name in ("n_ctx", "n_parallel", "port") and not isinstance(value, int):
            raise TypeError(f"an integer is required, got {value!r}")
        super().__setattr__(name, value)
