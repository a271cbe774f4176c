"""Models of requests, responses and stored records, by noun. They import no other part of the product."""
