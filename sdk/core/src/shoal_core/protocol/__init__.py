"""The words of the cluster: ids, resources, messages, records, subjects, errors, effects. No I/O."""
