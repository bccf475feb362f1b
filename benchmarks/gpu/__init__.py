# SPDX-License-Identifier: Apache-2.0
"""What `make bench-gpu` runs; see ``__main__.py``."""
