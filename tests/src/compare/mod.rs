//! One file a table: the rows it should have, from the guest's own truth.
