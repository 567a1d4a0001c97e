//! What a supervisor of the kind of systemd is told: that the server is ready, how it is, that it lives, that it stops.
//!
//! Nothing is said where nobody listens (`NOTIFY_SOCKET`). sd_notify is named here only.

use core::time::Duration;
use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::debug;

use crate::server::Server;

/// So often the supervisor is told how the server is, where it does not want to hear more often that it lives.
const REPORT: Duration = Duration::from_secs(30);

/// Says that the server is ready, and from then on how it is. Never returns; drop it to stop.
pub(super) async fn report(server: Arc<Server>) {
    let watchdog = sd_notify::watchdog_enabled();
    // Twice within the time after which it would be given up.
    let every = watchdog.map_or(REPORT, |patience| patience / 2).min(REPORT).max(Duration::from_millis(1));
    let mut due = interval(every);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said = String::new();
    let mut is_first = true;
    loop {
        due.tick().await;
        let (connected, online) = server.router.present();
        let status = match server.store.health().refusing {
            None => format!("{connected} clients are connected, {online} online"),
            Some(sentence) => format!("{connected} clients are connected, {online} online; {sentence}"),
        };
        let mut states = Vec::new();
        if core::mem::take(&mut is_first) {
            states.push(NotifyState::Ready);
        }
        if said != status {
            said = status;
            states.push(NotifyState::Status(&said));
        }
        // A store that does not answer is one more reason to be started anew.
        if watchdog.is_some() && timeout(every, server.store.client(&[0; 16])).await.is_ok() {
            states.push(NotifyState::Watchdog);
        }
        notify(&states);
    }
}

/// Says that the server stops.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("telling clients, and writing what they were promised")]);
}

fn notify(states: &[NotifyState<'_>]) {
    if !states.is_empty()
        && let Err(error) = sd_notify::notify(states)
    {
        debug!(%error, "the supervisor does not listen");
    }
}
