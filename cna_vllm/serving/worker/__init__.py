# SPDX-License-Identifier: Apache-2.0
"""What a worker does with its share of the model: tables on the device, routing, recording; no name
and no file is touched here."""
