//! PID 1 of a lab guest: loads modules, makes a known workload, then tells
//! the guest's own truth about it over a virtio-serial port, one JSON line a
//! request and one a reply (see the library part for both).
//!
//! It is a static program without runtime needs, so the guest's initramfs
//! holds little else. It isn't meant to run anywhere but in a lab guest, and
//! refuses to when it isn't process 1 or a role it started itself.

mod agent;

fn main() {
    agent::run();
}
