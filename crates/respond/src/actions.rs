//! What a gate does by itself once it is asked: stopping for good and letting
//! run, network links, dumps.

use std::time::Duration;

use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{Answer, LinkState, Request};

use crate::RespondError;

/// How long the gate may take for an answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(10);

/// How long QEMU may take to write a dump.
const DUMP: Duration = Duration::from_secs(3600);

/// A dump that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dumped {
    /// The file's name, in the folder that the gate's configuration names.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

pub(crate) fn done(client: &mut GateClient, request: Request) -> Result<(), RespondError> {
    match client.ask(request, ANSWER)? {
        Answer::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

pub(crate) fn unexpected(answer: &Answer) -> RespondError {
    RespondError::Answer(format!("{answer:?}").chars().take(80).collect())
}

/// Stops the target until somebody lets it run: [`resume`], or its operator.
/// Needs the right `respond`. Neither the monitor's nor the gate's end undoes
/// it.
///
/// # Errors
/// [`RespondError`], as of all actions.
pub fn pause(client: &mut GateClient) -> Result<(), RespondError> {
    done(client, Request::Stop)
}

/// Lets a target run that was stopped by [`pause`] or its operator.
///
/// # Errors
/// [`RespondError`].
pub fn resume(client: &mut GateClient) -> Result<(), RespondError> {
    done(client, Request::Start)
}

/// Takes the link from all network devices, or those named; gives their names.
///
/// # Errors
/// [`RespondError`]; [`RespondError::Partly`] if some were switched.
pub fn disconnect_network(
    client: &mut GateClient,
    devices: &[String],
) -> Result<Vec<String>, RespondError> {
    switch(client, devices, LinkState::Down)
}

/// Gives the link back.
///
/// # Errors
/// As [`disconnect_network`].
pub fn connect_network(
    client: &mut GateClient,
    devices: &[String],
) -> Result<Vec<String>, RespondError> {
    switch(client, devices, LinkState::Up)
}

fn switch(
    client: &mut GateClient,
    devices: &[String],
    state: LinkState,
) -> Result<Vec<String>, RespondError> {
    let devices = if devices.is_empty() {
        match client.ask(Request::NetworkDevices, ANSWER)? {
            Answer::NetworkDevices(devices) => devices,
            other => return Err(unexpected(&other)),
        }
    } else {
        devices.to_vec()
    };
    if devices.is_empty() {
        return Err(RespondError::NoNetwork);
    }
    // One that fails does not keep the others their link.
    let mut failure: Option<(String, ClientError)> = None;
    let mut switched = Vec::new();
    for device in &devices {
        let link = Request::Link {
            device: device.clone(),
            state,
        };
        match client.ask(link, ANSWER) {
            Ok(_) => switched.push(device.clone()),
            Err(error) => {
                failure.get_or_insert((device.clone(), error));
            }
        }
    }
    match failure {
        None => Ok(switched),
        Some((_, source)) if switched.is_empty() => Err(source.into()),
        Some((device, source)) => Err(RespondError::Partly {
            done: switched.len(),
            all: devices.len(),
            device,
            source,
        }),
    }
}

/// Has the target's memory written to a new file of this name in the gate's
/// folder for dumps. The target stands still until it is written.
///
/// # Errors
/// [`RespondError`].
pub fn dump(client: &mut GateClient, name: &str) -> Result<Dumped, RespondError> {
    let request = Request::Dump {
        name: name.to_owned(),
    };
    match client.ask(request, DUMP)? {
        Answer::Dumped { name, bytes } => Ok(Dumped { name, bytes }),
        other => Err(unexpected(&other)),
    }
}
