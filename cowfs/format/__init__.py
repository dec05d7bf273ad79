"""Every on-disk encoding that others may also read: whiteouts and marks, ACLs."""
