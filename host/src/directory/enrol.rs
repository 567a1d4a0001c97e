//! Devices that a client enrols: batches of which all are entered, or none (PROTOCOL 6.4).
//!
//! What is held of a batch belongs to the connection whose exporter its signatures cover, and goes with it.

use std::sync::{Arc, Mutex, PoisonError};

use ossicle_core::{Body, Enrol, MAX_ENROL_BATCH, MIN_RECORD_LIMIT, PublicKey, Reason, enrolment_statement};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Duration, sleep};
use tracing::info;
use uuid::Uuid;

use super::{Answered, Asker, Refusal, admit, enrol_reason};
use crate::crypto::has_small_factor;
use crate::mailbox::Owed;
use crate::name::Name;
use crate::server::{Policy, Server};
use crate::store::{Enrolment, RefusedEntry};

/// The unfinished batch of a connection.
#[derive(Default)]
pub(crate) struct Unfinished(Mutex<Option<Batch>>);

impl Unfinished {
    fn take(&self) -> Option<Batch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, batch: Batch) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(batch);
    }
}

/// What came of a batch so far.
struct Batch {
    count: u16,
    /// The entries, each with its correlation id. None any more once one was refused.
    held: Vec<(u16, Enrolment)>,
    /// Their room, of all that the server has.
    room: Option<OwnedSemaphorePermit>,
    refused: bool,
}

impl Batch {
    const fn new(count: u16) -> Self {
        Self { count, held: Vec::new(), room: None, refused: false }
    }
}

/// Holds an entry, or enters the batch that it completes. Returns whose request is answered, and how.
pub(super) async fn enrol(server: &Server, asker: &Asker, body: Body<'_>) -> (u16, Answered) {
    let Some(unfinished) = &asker.unfinished else { return (body.request(), Err(Reason::Malformed.into())) };
    let held = unfinished.take();
    let Ok(entry) = Enrol::decode(body) else {
        // It may have been any entry of what is held, and then that batch cannot be completed any more.
        unfinished.keep(Batch { refused: true, ..Batch::new(0) });
        return (body.request(), Err(Reason::Malformed.into()));
    };
    let mut batch = match held {
        Some(batch) if entry.index > 0 => batch,
        _ => Batch::new(entry.count),
    };
    let is_last = entry.index.checked_add(1) == Some(entry.count);
    if batch.refused {
        if !is_last {
            unfinished.keep(batch);
        }
        return (entry.request, Ok(None));
    }
    match batch.hold(server, asker, &entry).await {
        Ok(()) if is_last => batch.enter(server, asker, entry.request).await,
        Ok(()) => {
            unfinished.keep(batch);
            (entry.request, Ok(None))
        }
        Err(refusal) => {
            info!(name = entry.name, by = %Uuid::from_bytes(asker.id), reason = %refusal.reason, "did not enrol a device");
            if !is_last {
                unfinished.keep(Batch { refused: true, ..Batch::new(batch.count) });
            }
            (entry.request, Err(refusal))
        }
    }
}

impl Batch {
    /// Checks all of an entry that needs no other client.
    async fn hold(&mut self, server: &Server, asker: &Asker, entry: &Enrol<'_>) -> Result<(), Refusal> {
        if usize::from(entry.count) > MAX_ENROL_BATCH {
            return Err(Reason::TooLarge.into());
        }
        let is_next = usize::from(entry.index) == self.held.len() && entry.count == self.count;
        if !is_next || entry.index >= entry.count {
            return Err(Reason::Malformed.into());
        }
        if server.config().enrol == Policy::Closed {
            return Err(Reason::Forbidden.into());
        }
        while let Err(refusal) = admit(server, asker) {
            if entry.index == 0 {
                return Err(refusal);
            }
            // A batch that was begun is not lost to haste: nothing is read from this client meanwhile.
            sleep(Duration::from_millis(refusal.retry_after.unwrap_or_default().into())).await;
        }
        let room = Arc::clone(&server.held_devices).try_acquire_owned().map_err(|_| FULL)?;
        match &mut self.room {
            Some(rooms) => rooms.merge(room),
            None => self.room = Some(room),
        }

        let Enrol { id, name: given, modulus, signature, .. } = *entry;
        let key = PublicKey::from_modulus(modulus).map_err(|_| Reason::Malformed)?;
        let name = Name::parse(given).map_err(|_| Reason::Malformed)?;
        if has_small_factor(modulus) {
            return Err(Reason::Malformed.into());
        }
        let is_same = |(_, other): &(u16, Enrolment)| other.id == id || other.name == name || other.modulus == modulus;
        if self.held.iter().any(is_same) {
            return Err(Reason::NameInUse.into());
        }
        // Over the name as it was sent: the server's normalisation is none of the device's business.
        let statement = enrolment_statement(&asker.exporter, &asker.id, &id, given, key);
        if !server.pool.verify(modulus.to_vec(), statement, signature.to_vec()).await? {
            return Err(Reason::Unauthorised.into());
        }
        let enrolment = Enrolment {
            id,
            name,
            modulus: modulus.to_vec(),
            token_id: None,
            enrolled_by: Some(asker.id),
            // It says more when it connects.
            record_limit: u16::try_from(MIN_RECORD_LIMIT).unwrap_or(u16::MAX),
            now: server.now(),
        };
        self.held.push((entry.request, enrolment));
        Ok(())
    }

    /// Enters them all. `last` is the request of the last entry.
    async fn enter(self, server: &Server, asker: &Asker, last: u16) -> (u16, Answered) {
        let by = Uuid::from_bytes(asker.id);
        let (requests, batch): (Vec<u16>, Vec<Enrolment>) = self.held.into_iter().unzip();
        let devices: Vec<_> = batch.iter().map(|entry| (Uuid::from_bytes(entry.id), entry.name.clone())).collect();
        match server.store.enrol_all(batch).await {
            Ok(_) => {
                for (device, name) in devices {
                    server.presence().note(device.as_bytes(), false);
                    info!(%device, %name, %by, "enrolled a device");
                }
                (last, Ok(Some(Owed::Done(last))))
            }
            Err(RefusedEntry { index, error }) => {
                if let Some((_, name)) = devices.get(index) {
                    info!(%name, %by, %error, "did not enrol a device");
                }
                (requests.get(index).copied().unwrap_or(last), Err(enrol_reason(&error).into()))
            }
        }
    }
}

/// Others have unfinished batches: theirs are done in a moment, or go with their connections.
const FULL: Refusal = Refusal { reason: Reason::Unavailable, retry_after: Some(1000) };
