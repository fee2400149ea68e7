"""Train networks with HEM and with the losses it is compared to. Needs the extra: hem-ext[harness]."""
