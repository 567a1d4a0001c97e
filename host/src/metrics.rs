//! What a server counts, and how a monitoring system reads it: `/metrics`, `/healthz` and `/readyz` (`http`).
//!
//! Everybody counts into plain atomics, which are there whether or not anybody reads them; what others know already
//! (connected clients, the store's size) is looked up when it is asked for. No label names a client, an address or anything
//! else that a stranger can invent, so that the number of series is fixed. prometheus-client is named here only.

mod http;

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ossicle_core::Reason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use tokio::time::timeout;

pub use self::http::serve;
use crate::server::Server;

/// Something that happened so many times.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Once more.
    pub fn count(&self) {
        self.add(1);
    }

    /// So many times more.
    pub fn add(&self, times: u64) {
        self.0.fetch_add(times, Ordering::Relaxed);
    }

    /// How many times so far.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter for each reason.
#[derive(Debug, Default)]
pub struct ByReason([Counter; 32]);

impl ByReason {
    /// Once more for this reason.
    pub fn count(&self, reason: Reason) {
        if let Some(counter) = self.0.get(usize::from(reason.code())) {
            counter.count();
        }
    }

    /// For all reasons together.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::total).sum()
    }

    fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::ALL.iter().filter_map(|reason| Some((reason.as_str(), self.0.get(usize::from(reason.code()))?.total())))
    }
}

/// A counter for each of a few words, for what happens at most once to a connection.
#[derive(Debug, Default)]
pub struct ByWord(Mutex<BTreeMap<&'static str, u64>>);

impl ByWord {
    /// Once more for this word.
    pub fn count(&self, word: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(word).or_default() += 1;
    }

    fn each(&self) -> Vec<(&'static str, u64)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(word, total)| (*word, *total)).collect()
    }
}

/// How large something was, in buckets.
#[derive(Debug)]
pub struct Distribution {
    bounds: &'static [f64],
    /// One more than there are bounds.
    counts: Box<[Counter]>,
    /// In millionths.
    sum: Counter,
}

impl Distribution {
    /// Nothing yet, to be counted by these bounds, each the largest value of its bucket.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| Counter::default()).collect(), sum: Counter::default() }
    }

    /// Seconds that something took, from half a millisecond up.
    pub fn of_seconds() -> Self {
        Self::new(&[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0])
    }

    /// This took so long.
    pub fn took(&self, time: Duration) {
        self.add(time.as_secs_f64(), u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// There were so many.
    pub fn were(&self, many: u32) {
        self.add(many.into(), u64::from(many).saturating_mul(1_000_000));
    }

    fn add(&self, value: f64, millionths: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(counter) = self.counts.get(bucket) {
            counter.count();
        }
        self.sum.add(millionths);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(Counter::total).sum()
    }

    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = self.bounds.iter().copied().chain([f64::MAX]);
        let buckets: Vec<_> = bounds.zip(self.counts.iter().map(Counter::total)).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_micros(self.sum.total()).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }
}

/// What a server counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Connections that were accepted.
    pub connections: Counter,
    /// Connections that were turned away at once, by why.
    pub turned_away: ByWord,
    /// Connections that did not become a client's, by why.
    pub not_entered: ByWord,
    /// Handshakes that were refused, by the reason that was told.
    pub handshakes_refused: ByReason,
    /// Full handshakes.
    pub full: Counter,
    /// Resumptions.
    pub resumed: Counter,
    /// Full handshakes that came too fast for their source.
    pub hasty_handshakes: Counter,
    /// Clients that left, by why.
    pub ended: ByWord,
    /// Records of clients that were opened.
    pub records: Counter,
    /// Their bytes.
    pub received_bytes: Counter,
    /// Bytes of records for clients that their sockets took.
    pub sent_bytes: Counter,
    /// Records that came too fast for their client.
    pub hasty_records: Counter,
    /// Messages that clients sent.
    pub messages: Counter,
    /// Those of them that went no further, by the reason that their sender was told at once.
    pub messages_refused: ByReason,
    /// Posts in the public conversation.
    pub posts: Counter,
    /// Messages and wraps that were sealed for a client which took them from memory.
    pub delivered_passing: Counter,
    /// The same, of what waited in the store; what is not acknowledged is delivered again.
    pub delivered_waiting: Counter,
}

/// How a store is.
#[derive(Debug, Default)]
pub struct StoreHealth {
    /// What it said last to somebody who wanted to write, if that did not work.
    pub refusing: Option<String>,
    /// Bytes of its files.
    pub bytes: u64,
    /// Items that wait for clients: messages, wraps and receipts.
    pub waiting: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// Clients that something waits for.
    pub waiting_clients: u64,
    /// What its writer counts.
    pub writer: Option<Arc<WriterMetrics>>,
}

/// What the writer of a store counts.
#[derive(Debug)]
pub struct WriterMetrics {
    /// From the first operation of a transaction to its end on the disk.
    pub seconds: Distribution,
    /// Operations of a transaction.
    pub operations: Distribution,
    /// Transactions that failed.
    pub failures: Counter,
    /// Messages, wraps and receipts that were let wait.
    pub stored: Counter,
    /// Those that were not, by why.
    pub not_stored: ByWord,
}

impl Default for WriterMetrics {
    fn default() -> Self {
        let operations = Distribution::new(&[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]);
        Self {
            seconds: Distribution::of_seconds(),
            operations,
            failures: Counter::default(),
            stored: Counter::default(),
            not_stored: ByWord::default(),
        }
    }
}

/// A server as a monitoring system sees it.
pub struct Monitor {
    server: Arc<Server>,
    registry: Registry,
    /// Whether the store could be written, and when that was tried.
    tried: tokio::sync::Mutex<Option<(Instant, Option<String>)>>,
}

/// The store is tried at most so often.
const TRY: Duration = Duration::from_secs(1);
/// A store that does not answer for so long is not ready.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);

impl Monitor {
    /// Watches this server.
    pub fn new(server: Arc<Server>) -> Self {
        let mut registry = Registry::with_prefix("ossicle");
        registry.register_collector(Box::new(Scrape(Arc::clone(&server))));
        Self { server, registry, tried: tokio::sync::Mutex::default() }
    }

    /// Everything that is counted, in the text format of OpenMetrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// What stands against sending clients here, each one sentence; nothing if it is ready.
    pub async fn obstacles(&self) -> Vec<String> {
        let mut obstacles = Vec::new();
        if self.server.is_stopping() {
            obstacles.push("the server is stopping".to_owned());
        } else if !self.server.is_listening() {
            obstacles.push("the server takes no connections".to_owned());
        }
        obstacles.extend(self.try_store().await);
        obstacles
    }

    /// What stands against writing, by trying it: the store may have recovered since it last refused somebody.
    async fn try_store(&self) -> Option<String> {
        let mut tried = self.tried.lock().await;
        if let Some((_, outcome)) = tried.as_ref().filter(|(at, _)| at.elapsed() < TRY) {
            return outcome.clone();
        }
        let outcome = match timeout(TRY_TIMEOUT, self.server.store.probe()).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("the store does not answer".to_owned()),
        };
        *tried = Some((Instant::now(), outcome.clone()));
        outcome
    }
}

/// Reads everything anew for each scrape.
struct Scrape(Arc<Server>);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (server, mut out) = (&*self.0, Out(encoder));
        let counted = &server.metrics;
        let version = env!("CARGO_PKG_VERSION");
        out.0
            .encode_descriptor("build", "The version that runs", None, MetricType::Info)?
            .encode_info(&[("version", version)])?;
        let since = "When the server was started, in seconds since 1970";
        out.gauge("start_time", since, Some(Unit::Seconds), server.started())?;
        let (connected, online) = server.router.present();
        out.gauge("clients_connected", "Clients that are connected", None, connected)?;
        out.gauge("clients_online", "Clients that take messages now", None, online)?;

        let gate = &server.gate;
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        out.gauge("connections_open", "Connections, of clients and strangers", None, count(gate.connections()))?;
        out.gauge("handshakes_open", "Connections in their handshake", None, count(gate.unauthenticated()))?;
        let busy = gate.is_busy(server.pool.waiting());
        out.gauge("under_load", "1 while strangers have to work before the server signs", None, u64::from(busy))?;
        out.counter("connections", "Connections that were accepted", None, counted.connections.total())?;
        let turned_away = counted.turned_away.each();
        out.counters("connections_turned_away", "Connections that were turned away at once", "cause", turned_away)?;
        let kinds = [("full", counted.full.total()), ("resumption", counted.resumed.total())];
        out.counters("handshakes", "Handshakes by which a client entered", "kind", kinds)?;
        let failed = counted.not_entered.each();
        out.counters("handshakes_failed", "Connections that did not become a client's", "cause", failed)?;
        let refused = counted.handshakes_refused.each();
        out.counters("handshakes_refused", "Clients that were told why they may not enter", "reason", refused)?;
        out.counters("connections_ended", "Clients' connections that ended", "cause", counted.ended.each())?;
        let hasty = [("handshakes", counted.hasty_handshakes.total()), ("messages", counted.hasty_records.total())];
        out.counters("rate_limited", "What came too fast, by the rate that it was beyond", "limit", hasty)?;

        out.counter("records_received", "Records of clients", None, counted.records.total())?;
        let (received, sent) = (counted.received_bytes.total(), counted.sent_bytes.total());
        out.counter("received", "Bytes of clients' records", Some(Unit::Bytes), received)?;
        out.counter("sent", "Bytes of records that clients' sockets took", Some(Unit::Bytes), sent)?;
        out.counter("messages", "Messages that clients sent", None, counted.messages.total())?;
        out.counter("posts", "What clients said in the public conversation", None, counted.posts.total())?;
        let refused = counted.messages_refused.each();
        out.counters(
            "messages_refused",
            "Messages whose sender was told at once why they go no further",
            "reason",
            refused,
        )?;
        let (passing, waiting) = (counted.delivered_passing.total(), counted.delivered_waiting.total());
        let from = [("memory", passing), ("store", waiting)];
        out.counters("deliveries", "Messages and wraps that were handed to clients, by where they were", "from", from)?;
        out.counter("rsa_signatures", "Signatures of the server's key", None, server.pool.signs())?;
        out.counter("rsa_verifications", "Signatures of clients that were verified", None, server.pool.verifies())?;

        let store = server.store.health();
        out.gauge("store_refusing", "1 while the store refuses to write", None, u64::from(store.refusing.is_some()))?;
        out.gauge("store_size", "Size of the store's files", Some(Unit::Bytes), store.bytes)?;
        out.gauge("queue_items", "Messages, wraps and receipts that wait in the store", None, store.waiting)?;
        out.gauge("queue", "Their size", Some(Unit::Bytes), store.waiting_bytes)?;
        out.gauge("queue_clients", "Clients that something waits for", None, store.waiting_clients)?;
        if let Some(writer) = &store.writer {
            let help = "Time from the first operation of a transaction to its end on the disk";
            let seconds = Some(Unit::Seconds);
            writer.seconds.encode(out.descriptor("store_commit", help, seconds.as_ref(), MetricType::Histogram)?)?;
            let help = "Operations of a transaction";
            writer.operations.encode(out.descriptor(
                "store_commit_operations",
                help,
                None,
                MetricType::Histogram,
            )?)?;
            out.counter(
                "items_stored",
                "Messages, wraps and receipts that were let wait",
                None,
                writer.stored.total(),
            )?;
            let not_stored = writer.not_stored.each();
            out.counters("items_not_stored", "Messages, wraps and receipts that were not", "cause", not_stored)?;
            out.counter("store_commits_failed", "Transactions that failed", None, writer.failures.total())?;
        }
        Ok(())
    }
}

struct Out<'e>(DescriptorEncoder<'e>);

impl Out<'_> {
    fn descriptor<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
        unit: Option<&'s Unit>,
        kind: MetricType,
    ) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.0.encode_descriptor(name, help, unit, kind)
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        self.descriptor(name, help, unit.as_ref(), MetricType::Gauge)?.encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<Unit>, total: u64) -> fmt::Result {
        self.descriptor(name, help, unit.as_ref(), MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&total, None)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        each: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> fmt::Result {
        let mut family = self.descriptor(name, help, None, MetricType::Counter)?;
        for (value, total) in each {
            family.encode_family(&[(label, value)])?.encode_counter::<NoLabelSet, _, u64>(&total, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_distributed_is_in_the_bucket_that_bounds_it() {
        let distribution = Distribution::new(&[1.0, 2.0]);
        for many in [0, 1, 2, 2, 3] {
            distribution.were(many);
        }
        assert_eq!(distribution.counts.iter().map(Counter::total).collect::<Vec<_>>(), [2, 2, 1]);
        assert_eq!((distribution.count(), distribution.sum.total()), (5, 8_000_000));
        let distribution = Distribution::of_seconds();
        distribution.took(Duration::from_micros(500));
        distribution.took(Duration::MAX);
        assert_eq!(distribution.counts.iter().map(Counter::total).filter(|count| *count == 1).count(), 2);
    }

    #[test]
    fn every_reason_has_a_counter() {
        let counters = ByReason::default();
        for reason in Reason::ALL {
            counters.count(*reason);
        }
        assert_eq!(counters.total(), Reason::ALL.len() as u64);
        assert!(counters.each().all(|(_, total)| total == 1));
    }
}
