"""Weight formats of the routed experts, and the methods that compute with them."""
