//! A clean monitor is trusted, and an attacked one is not.

use anyhow::Result;
use secmon_lifetime::Suite;
use secmon_lifetime::attacks::ATTACKS;

#[test]
fn a_clean_monitor_is_trusted_and_every_attack_has_its_outcome() -> Result<()> {
    let mut suite = Suite::start()?;
    suite.clean(20)?;
    let measured = suite.run()?;
    assert_eq!(measured.len(), ATTACKS.len());
    for measured in measured {
        println!("{measured:?}");
    }
    suite.clean(5)
}
