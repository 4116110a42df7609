"""The checkpoint formats: what each is called inside, read and written tensor by tensor."""
