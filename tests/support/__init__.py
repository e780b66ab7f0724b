"""What tests share: small models, made data, fake services, and runs built of them."""
