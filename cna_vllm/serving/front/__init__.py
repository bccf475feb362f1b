# SPDX-License-Identifier: Apache-2.0
"""What a front end does with a request and with files: names, admission, metrics; no engine is
touched here."""
