//! The launch measurement of a confidential monitoring VM.

use std::fs;

use anyhow::{Context, Result, anyhow};
use secmon_confidential::Hexadecimal;
use secmon_confidential::snp::launch::{self, DirectBoot, Processor};
use secmon_monitor::appliance::Image;

use super::arguments::{ConfidentialKind, ConfidentialLaunch};
use crate::report::Advise;

/// What a confidential VM is launched from beside its image.
pub(super) struct Launch {
    firmware: Vec<u8>,
    processor: Processor,
    processors: u32,
    features: u64,
}

impl Launch {
    /// What was asked for, checked as far as it can be without an image.
    pub(super) fn of(arguments: &ConfidentialLaunch) -> Result<Option<Self>> {
        let (Some(ConfidentialKind::Snp), Some(ovmf)) = (arguments.confidential, &arguments.ovmf)
        else {
            return Ok(None);
        };
        let name = &arguments.vcpu_type;
        let processor = Processor::named(name)
            .ok_or_else(|| anyhow!("{name:?} is no processor that can run SEV-SNP guests"))
            .advise("name one of EPYC, EPYC-Rome, EPYC-Milan, EPYC-Genoa and EPYC-Turin, as QEMU's -cpu does")?;
        let firmware =
            fs::read(ovmf).with_context(|| format!("reading the firmware {}", ovmf.display()))?;
        let launch = Self {
            firmware,
            processor,
            processors: arguments.vcpus,
            features: arguments.sev_features,
        };
        launch
            .measured(&[], &[], "")
            .with_context(|| ovmf.display().to_string())
            .advise("build OVMF from OvmfPkg/AmdSev, or install a package of it")?;
        Ok(Some(launch))
    }

    /// The measurement with this image.
    pub(super) fn measurement(&self, image: &Image) -> Result<Hexadecimal<48>> {
        let read = |path: std::path::PathBuf| {
            fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        let arguments = super::kernel_arguments(image);
        let (kernel, initramfs) = (read(image.kernel())?, read(image.initramfs())?);
        Ok(self.measured(&kernel, &initramfs, &arguments)?)
    }

    fn measured(
        &self,
        kernel: &[u8],
        initramfs: &[u8],
        command_line: &str,
    ) -> Result<Hexadecimal<48>, launch::LaunchError> {
        launch::measurement(&launch::Launch {
            firmware: &self.firmware,
            kernel: Some(DirectBoot {
                kernel,
                initramfs,
                command_line,
            }),
            processors: self.processors,
            processor: self.processor,
            features: self.features,
        })
    }
}
