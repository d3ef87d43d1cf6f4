"""Raw values to ids and scaled numbers: dictionaries, vocabularies, quantiles, ranges; counted on train rows, then frozen."""
