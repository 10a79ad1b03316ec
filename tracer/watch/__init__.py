"""`latrace watch`: the last seconds in memory, rules that fire, and the bundles they leave."""
