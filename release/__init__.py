"""What a release is made of: packages that anybody can build again, their bill of materials, and the reference."""
