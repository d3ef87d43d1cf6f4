"""From the columns of raw files to rows: joins, conversions, conditions, tables that several datasets share."""
