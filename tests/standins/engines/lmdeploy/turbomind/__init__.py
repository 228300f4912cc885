"""The backend in C++."""

import os

_import_error = os.environ.get("FAKE_IMPORT_ERROR")
