"""From runs to a table: cleaned, aggregated, fitted, stored."""
