# SPDX-License-Identifier: Apache-2.0
"""Many prompts under many arms in one engine: read, planned, answered, resumed."""
