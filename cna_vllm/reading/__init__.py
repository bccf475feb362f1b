# SPDX-License-Identifier: Apache-2.0
"""Reading circuits: where they lie, what they write, and what two of them share."""
