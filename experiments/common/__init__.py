"""What experiments share: shapes, data, timing, checking, records, reports."""
