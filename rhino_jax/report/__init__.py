"""Plans and audits as a person reads them."""
