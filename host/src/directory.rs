//! Requests that need the disk or RSA: who is who, bundles, chains, enrolling and revoking, keys that follow others, posts.
//!
//! Each runs as a job of the asking client's channel, which reads nothing more from that client until it is done, and
//! puts its answer into the client's mailbox. The authority of the asker is checked here and nowhere else; that the asker
//! is who it says was settled by the handshake. Wraps and envelopes pass through unread.

use core::net::IpAddr;
use core::num::NonZeroUsize;
use std::sync::Arc;

use ossicle_core::{
    Answer, Body, Bundle, Change, ChannelInfo, Channels, ChannelsResponse, CloseConversation, DirectoryEntry,
    DirectoryList, Enrol, EnvelopeHeader, ExpireChannels, Follow, Init, Lookup, MAX_NAME_LEN, MAX_RSA_LEN, Message,
    Presence, PublicKey, RECORD_OVERHEAD, Reason, Rotate, Rotation, Say, Secret, SignedBundle, Subject, SuccessorQuery,
    Unwatch, Watch, WatchResponse, WrapHeader,
};
use tracing::{info, warn};
use uuid::Uuid;

use crate::channel::note;
use crate::crypto::{PoolError, has_small_factor};
use crate::keeper::{self, Batch};
use crate::limits::Admission;
use crate::mailbox::{Mailbox, Owed, refusal};
use crate::name::{Name, Pattern};
use crate::presence::{self, status};
use crate::router::{Outgoing, Sent, Told};
use crate::server::Server;
use crate::store::{
    BundleRecord, ChainError, ClientId, ClientRecord, EnrolError, ItemKind, NewItem, NewKey, PublishError, RotateError,
    StoreError,
};

pub(crate) use enrol::Unfinished;

mod enrol;
pub(crate) mod groups;
mod public;

/// Lines of a directory page that are asked of the store at once.
const PAGE: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Codes of the requests that stand apart from the catalogue.
pub(crate) const REQUESTS: [u16; 12] = [
    Enrol::CODE,
    Rotate::CODE,
    SuccessorQuery::CODE,
    Watch::CODE,
    Unwatch::CODE,
    Channels::CODE,
    ExpireChannels::CODE,
    Init::CODE,
    Answer::CODE,
    CloseConversation::CODE,
    Say::CODE,
    Follow::CODE,
];

/// The authenticated client that asks.
pub(crate) struct Asker {
    pub(crate) id: ClientId,
    pub(crate) source: IpAddr,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) exporter: Secret<32>,
    /// There if it enrols.
    pub(crate) unfinished: Option<Arc<Unfinished>>,
}

/// Does what the decoded `payload` asks for, and owes the answer to the asker.
pub(crate) async fn answer(server: Arc<Server>, asker: Asker, payload: Vec<u8>) {
    let Ok(message) = Message::decode(&payload) else {
        asker.mailbox.owe(Owed::refused(0, Reason::Malformed));
        return;
    };
    let (request, answered) = match message {
        Message::Send { wanted, envelope } => {
            let Ok(header) = EnvelopeHeader::decode(envelope) else {
                asker.mailbox.owe(Owed::refused(0, Reason::Malformed));
                return;
            };
            let sent = match server.route(&header.chain_id).await {
                Ok(route) => {
                    let message = Outgoing { header: &header, wanted, envelope };
                    server.router.send(&asker.id, route.as_deref(), message, false, || server.now())
                }
                Err(error) => Sent::Told(Some(refusal(header.chain_id, header.n, unavailable(&error)))),
            };
            let receipts = match sent {
                Sent::Told(receipt) => receipt.map(Owed::Receipt).into_iter().collect(),
                Sent::Keep(items, refused) => {
                    let mut batch = Batch::default();
                    batch.push(&header, wanted, refused, items);
                    batch.keep(&server.keeper).await
                }
            };
            for receipt in receipts {
                asker.mailbox.owe(receipt);
            }
            return;
        }
        Message::Tell(receipt) => {
            let told = match server.route(&receipt.chain).await {
                Ok(route) => {
                    let told = server.router.tell(&asker.id, route.as_deref(), &receipt);
                    if told == Told::Done {
                        asker.mailbox.settle(&receipt.chain, receipt.from, receipt.to);
                    }
                    told
                }
                Err(error) => {
                    asker.mailbox.owe(Owed::refused(0, unavailable(&error)));
                    return;
                }
            };
            if let Some(reason) = told_reason(told) {
                asker.mailbox.owe(Owed::refused(0, reason));
            }
            return;
        }
        Message::Listening => {
            // Everything that others kept for this client up to now is offered or counted before it listens.
            server.keeper.settled().await;
            let waiting = server.store.waiting(&asker.id).await;
            asker.mailbox.listen(waiting.map_or(true, |waiting| waiting.items > 0));
            return;
        }
        Message::NotListening => {
            note(asker.id, server.store.touch(&asker.id, server.now()).await);
            return;
        }
        Message::Lookup(asked) => (asked.request, lookup(&server, &asker, &asked).await),
        Message::List { request, after } => (request, list(&server, &asker, request, after).await),
        Message::Publish { request, bundle } => (request, publish(&server, &asker, request, &bundle).await),
        Message::Revoke { request, subject } => (request, revoke(&server, &asker, request, &subject).await),
        Message::Other(body) => match body.code() {
            Enrol::CODE => enrol::enrol(&server, &asker, body).await,
            Rotate::CODE => (body.request(), rotate(&server, &asker, body).await),
            SuccessorQuery::CODE => (body.request(), successor(&server, &asker, body).await),
            Watch::CODE => (body.request(), watch(&server, &asker, body).await),
            Unwatch::CODE => (body.request(), unwatch(&server, &asker, body)),
            Channels::CODE => (body.request(), channels(&server, &asker, body).await),
            ExpireChannels::CODE => (body.request(), expire_channels(&server, &asker, body).await),
            Init::CODE => (body.request(), groups::init(&server, &asker, body).await),
            Answer::CODE => (body.request(), groups::answer(&server, &asker, body).await),
            CloseConversation::CODE => (body.request(), groups::close(&server, &asker, body).await),
            Say::CODE => (body.request(), public::say(&server, &asker, body).await),
            Follow::CODE => (body.request(), public::follow(&server, &asker, body).await),
            _ => (0, Err(Reason::Malformed.into())),
        },
        Message::Wrap { request, to, wrap, bundle } => {
            (request, self::wrap(&server, &asker, request, to, wrap, bundle).await)
        }
        _ => (0, Err(Reason::Unsupported.into())),
    };
    match answered {
        Ok(Some(owed)) => asker.mailbox.owe(owed),
        Ok(None) => return,
        Err(Refusal { reason, retry_after }) => asker.mailbox.owe(Owed::Refused { request, reason, retry_after }),
    };
}

/// What a recipient whose receipt was not taken is told.
pub(crate) const fn told_reason(told: Told) -> Option<Reason> {
    match told {
        Told::Done => None,
        Told::Forbidden => Some(Reason::Forbidden),
        Told::Malformed => Some(Reason::Malformed),
    }
}

/// Why a request is not done.
struct Refusal {
    reason: Reason,
    retry_after: Option<u32>,
}

/// The answer to be sent now, or none if it comes from elsewhere.
type Answered = Result<Option<Owed>, Refusal>;

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self { reason, retry_after: None }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        unavailable(&error).into()
    }
}

impl From<PoolError> for Refusal {
    fn from(_: PoolError) -> Self {
        Self { reason: Reason::Unavailable, retry_after: Some(1000) }
    }
}

pub(crate) fn unavailable(error: &StoreError) -> Reason {
    warn!(%error, "the store could not answer");
    Reason::Unavailable
}

async fn lookup(server: &Server, asker: &Asker, asked: &Lookup<'_>) -> Answered {
    let client = find(server, &asked.subject).await?;
    let bundle = if asked.bundle { server.store.bundle(&client.id).await? } else { None };
    let entry = DirectoryEntry {
        id: client.id,
        name: &client.name,
        key_epoch: client.key_epoch,
        record_limit: client.record_limit,
        status: status(server, &client),
        modulus: asked.key.then_some(&client.modulus),
        bundle: bundle.as_ref().map(|held| SignedBundle { bundle: &held.bundle, signature: &held.signature }),
    };
    encode(asker, &Message::LookupResponse { request: asked.request, entry })
}

async fn list(server: &Server, asker: &Asker, request: u16, after: &str) -> Answered {
    let after = match after {
        "" => None,
        name => Some(Name::parse(name).map_err(|_| Reason::Malformed)?),
    };
    let clients = server.store.clients(after.as_ref(), PAGE.get()).await?;
    let mut more = clients.len() == PAGE.get();
    // Code, request and `more` take six bytes at most.
    let mut lines = vec![0; asker.mailbox.max_payload().saturating_sub(6)];
    let mut len = 0;
    for client in &clients {
        let line = Presence { id: client.id, name: &client.name, status: status(server, client) };
        match DirectoryList::append(&line, lines.get_mut(len..).unwrap_or_default()) {
            Some(line) => len += line,
            None => {
                more = true;
                break;
            }
        }
    }
    let lines = lines.get(..len).unwrap_or_default();
    encode(asker, &Message::ListResponse(DirectoryList::new(request, more, lines)))
}

/// A page of those whom a pattern selects, and whatever becomes of them from the first page on.
async fn watch(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let Watch { request, pattern, after } = Watch::decode(body).map_err(|_| Reason::Malformed)?;
    let pattern = Pattern::parse(pattern).map_err(|_| Reason::Malformed)?;
    let after = match after {
        "" => {
            server.presence().watch(&asker.mailbox, pattern.clone())?;
            None
        }
        name => {
            let name = Name::parse(name).map_err(|_| Reason::Malformed)?;
            if asker.mailbox.watching(|watch| watch.watches(&pattern)) != Some(true) {
                return Err(Reason::Unknown.into());
            }
            Some(name)
        }
    };
    asker.mailbox.watching(presence::Watch::begin_page);
    let clients = server.store.clients(after.as_ref(), PAGE.get()).await;
    let statuses = clients.map(|clients| {
        let selected = |client: ClientRecord| {
            let selected = Name::parse(&client.name).is_ok_and(|name| pattern.matches(&name));
            let status = selected.then(|| status(server, &client));
            (client, status)
        };
        clients.into_iter().map(selected).collect::<Vec<_>>()
    });
    // The answer is owed before the channel goes on: nothing that is told of from here on comes before it.
    let told = asker.mailbox.watching(presence::Watch::end_page).unwrap_or_default();
    let clients = statuses?;
    let mut next =
        if clients.len() == PAGE.get() { clients.last().map(|(client, _)| client.name.as_str()) } else { None };
    // Code, request, the longest name and two lengths.
    let mut lines = vec![0; asker.mailbox.max_payload().saturating_sub(9 + MAX_NAME_LEN)];
    let (mut len, mut last) = (0, None);
    for (client, status) in &clients {
        if status.is_some() && !told.contains(&client.id) {
            let line = Change { id: client.id, name: &client.name, status: *status };
            let Some(line) = line.append(lines.get_mut(len..).unwrap_or_default()) else {
                next = last;
                break;
            };
            len += line;
        }
        last = Some(client.name.as_str());
    }
    let page = WatchResponse { request, next: next.unwrap_or_default(), lines: lines.get(..len).unwrap_or_default() };
    let mut buffer = vec![0; asker.mailbox.max_payload()];
    encode(asker, &page.encode(&mut buffer).map_err(|_| Reason::Unavailable)?)
}

fn unwatch(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let Unwatch { request, pattern } = Unwatch::decode(body).map_err(|_| Reason::Malformed)?;
    let pattern = Pattern::parse(pattern).map_err(|_| Reason::Malformed)?;
    if !asker.mailbox.unwatch(&pattern) {
        server.presence().forget(asker.mailbox.connection());
    }
    Ok(Some(Owed::Done(request)))
}

/// A bundle of the next epoch, signed by the asker's key.
async fn publish(server: &Server, asker: &Asker, request: u16, signed: &SignedBundle<'_>) -> Answered {
    let bundle = Bundle::decode(signed.bundle).map_err(|_| Reason::Malformed)?;
    let client = server.store.client(&asker.id).await?.ok_or(Reason::Unauthorised)?;
    if bundle.id != asker.id || fingerprint(&client) != Some(bundle.key) {
        return Err(Reason::Forbidden.into());
    }
    if !server.pool.verify(client.modulus, bundle.statement(), signed.signature.to_vec()).await? {
        return Err(Reason::Unauthorised.into());
    }
    // All its keys are new: it may have lost its groups with the old ones. Said before, so that nothing can come between.
    let held = server.store.bundle(&asker.id).await?.and_then(|held| Bundle::decode(&held.bundle).ok());
    if held.is_some_and(|held| held.verifying != bundle.verifying && held.epoch < bundle.epoch)
        && server.store.invite_again(&asker.id, server.now()).await?
    {
        server.greet(&[asker.id]).await;
    }
    match server.store.publish_bundle(&asker.id, bundle.epoch, signed.bundle, signed.signature).await {
        Ok(()) => Ok(Some(Owed::Done(request))),
        Err(PublishError::Epoch { .. }) => Err(Reason::Rewound.into()),
        Err(PublishError::Store(error)) => Err(error.into()),
        Err(_) => Err(Reason::Unauthorised.into()),
    }
}

/// What a client that was not entered is told.
pub(crate) fn enrol_reason(error: &EnrolError) -> Reason {
    match error {
        EnrolError::IdInUse | EnrolError::KeyInUse | EnrolError::NameInUse => Reason::NameInUse,
        EnrolError::Store(error) => unavailable(error),
        _ => Reason::Unauthorised,
    }
}

/// A client revokes itself and what it enrolled.
async fn revoke(server: &Server, asker: &Asker, request: u16, subject: &Subject<'_>) -> Answered {
    let client = find(server, subject).await?;
    if client.id != asker.id && client.enrolled_by != Some(asker.id) {
        return Err(Reason::Forbidden.into());
    }
    let itself = client.id == asker.id;
    let tell = || {
        info!(client = %Uuid::from_bytes(client.id), by = %Uuid::from_bytes(asker.id), "revoked");
        if itself {
            asker.mailbox.owe(Owed::Done(request));
        }
    };
    let revoked = server.revoke_telling(&client.id, tell).await;
    if itself && revoked.is_ok() {
        return Ok(None);
    }
    revoked?;
    Ok(Some(Owed::Done(request)))
}

/// What the asker could resume.
async fn channels(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let Channels { request } = Channels::decode(body).map_err(|_| Reason::Malformed)?;
    let now = server.now();
    let held = server.channels_of(&asker.id).await?;
    let mut infos = held.into_iter().map(|(id, expires)| {
        let valid_for = u32::try_from(expires.saturating_sub(now)).unwrap_or(u32::MAX);
        ChannelInfo { id, valid_for }
    });
    let (first, second) = (infos.next(), infos.next());
    let mut buffer = [0; 64];
    let held = ChannelsResponse { request, first, second }.encode(&mut buffer).map_err(|_| Reason::Unavailable)?;
    encode(asker, &held)
}

async fn expire_channels(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let ExpireChannels { request } = ExpireChannels::decode(body).map_err(|_| Reason::Malformed)?;
    server.expire_channels(&asker.id).await?;
    Ok(Some(Owed::Done(request)))
}

/// A new identity key, named by the present one, held by who asks, with its bundle.
async fn rotate(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let offer = Rotate::decode(body).map_err(|_| Reason::Malformed)?;
    let Rotate { request, key_epoch, modulus, signature, proof, bundle: signed } = offer;
    let next = PublicKey::from_modulus(modulus).map_err(|_| Reason::Malformed)?;
    if has_small_factor(modulus) {
        return Err(Reason::Malformed.into());
    }
    let bundle = Bundle::decode(signed.bundle).map_err(|_| Reason::Malformed)?;
    if bundle.id != asker.id || bundle.key != next.fingerprint() {
        return Err(Reason::Malformed.into());
    }
    admit(server, asker)?;
    let client = server.store.client(&asker.id).await?.filter(|client| !client.revoked).ok_or(Reason::Unauthorised)?;
    if (client.key_epoch, client.modulus.as_slice()) != (key_epoch, modulus) {
        if client.key_epoch.checked_add(1) != Some(key_epoch) {
            return Err(Reason::Rewound.into());
        }
        let former = fingerprint(&client).ok_or(Reason::Unavailable)?;
        let rotation = Rotation { id: asker.id, former, next: next.fingerprint(), key_epoch };
        let signatures = [
            (client.modulus, rotation.statement(), signature),
            (modulus.to_vec(), rotation.possession(&asker.exporter), proof),
            (modulus.to_vec(), bundle.statement(), signed.signature),
        ];
        for (modulus, statement, signature) in signatures {
            if !server.pool.verify(modulus, statement, signature.to_vec()).await? {
                return Err(Reason::Unauthorised.into());
            }
        }
    }
    let new = NewKey {
        id: asker.id,
        key_epoch,
        modulus: modulus.to_vec(),
        signature: signature.to_vec(),
        bundle: BundleRecord {
            epoch: bundle.epoch,
            bundle: signed.bundle.to_vec(),
            signature: signed.signature.to_vec(),
        },
    };
    match server.rotate(new, &asker.mailbox).await {
        Ok(()) => {
            info!(client = %Uuid::from_bytes(asker.id), key_epoch, "replaced the identity key");
            asker.mailbox.owe(Owed::Done(request));
            // The connection was authenticated by the former key.
            asker.mailbox.end(None);
            Ok(None)
        }
        Err(error) => {
            info!(client = %Uuid::from_bytes(asker.id), %error, "did not replace the identity key");
            Err(match error {
                RotateError::BundleEpoch { .. } | RotateError::KeyEpoch { .. } => Reason::Rewound,
                RotateError::KeyInUse => Reason::NameInUse,
                RotateError::Store(error) => unavailable(&error),
                _ => Reason::Unauthorised,
            }
            .into())
        }
    }
}

async fn successor(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let SuccessorQuery { request, id, key_epoch } = SuccessorQuery::decode(body).map_err(|_| Reason::Malformed)?;
    server.store.client(&id).await?.filter(|client| !client.revoked).ok_or(Reason::Unknown)?;
    let successor = server.store.successor(&id, key_epoch).await?.ok_or(Reason::Unknown)?;
    let mut buffer = [0; 2 * MAX_RSA_LEN + 16];
    let step = ossicle_core::Successor { request, modulus: &successor.modulus, signature: &successor.signature };
    encode(asker, &step.encode(&mut buffer).map_err(|_| Reason::Unavailable)?)
}

/// What is as dear to the server as a first contact is limited with it.
fn admit(server: &Server, asker: &Asker) -> Result<(), Refusal> {
    match server.limits.handshake(asker.source) {
        Admission::Admit => Ok(()),
        Admission::Refuse { retry_after } => Err(Refusal { reason: Reason::Rate, retry_after: Some(retry_after) }),
        Admission::Ignore => Err(Refusal { reason: Reason::Rate, retry_after: Some(1000) }),
    }
}

/// The chain is registered before its wrap is kept, so that no message on it meets a server that does not know it. `Done`
/// comes when the wrap is durable: without it, what follows on the chain is worth nothing.
async fn wrap(
    server: &Server,
    asker: &Asker,
    request: u16,
    to: ClientId,
    wrap: &[u8],
    bundle: SignedBundle<'_>,
) -> Answered {
    let header = WrapHeader::decode(wrap).map_err(|_| Reason::Malformed)?;
    if Bundle::decode(bundle.bundle).map_err(|_| Reason::Malformed)?.id != asker.id {
        return Err(Reason::Forbidden.into());
    }
    let recipient = server.store.client(&to).await?.filter(|client| !client.revoked).ok_or(Reason::Unknown)?;
    let room = usize::from(recipient.record_limit).saturating_sub(RECORD_OVERHEAD);
    let bytes = bytes_of(&Message::WrapDelivery { from: asker.id, wrap, bundle }, room).ok_or(Reason::TooLarge)?;
    match server.store.register_chain(&header.chain_id, &asker.id, &header.sid, &to).await {
        Ok(()) => {}
        Err(ChainError::InUse) => return Err(Reason::NameInUse.into()),
        Err(ChainError::NotMember) => return Err(Reason::NotMember.into()),
        Err(ChainError::Closed) => return Err(Reason::Closed.into()),
        Err(ChainError::Store(error)) => return Err(error.into()),
        Err(_) => return Err(Reason::Unknown.into()),
    }
    server.router.forget_chain(&header.chain_id);
    let item = NewItem {
        recipient: to,
        sender: asker.id,
        kind: ItemKind::Wrap,
        chain: header.chain_id,
        n: 0,
        wanted: 0,
        bytes: bytes.into(),
        at: server.now(),
    };
    match server.keeper.keep(vec![item]).await?.pop() {
        Some(Ok(_)) => Ok(Some(Owed::Done(request))),
        Some(Err(error)) => Err(keeper::reason(&error).into()),
        None => Err(Reason::Unavailable.into()),
    }
}

/// Who is meant; the revoked are as unknown as those who never were.
async fn find(server: &Server, subject: &Subject<'_>) -> Result<ClientRecord, Refusal> {
    let client = match subject {
        Subject::Id(id) => server.store.client(id).await?,
        Subject::Name(name) => match Name::parse(name) {
            Ok(name) => server.store.client_by_name(&name).await?,
            Err(_) => None,
        },
    };
    client.filter(|client| !client.revoked).ok_or_else(|| Reason::Unknown.into())
}

pub(crate) fn fingerprint(client: &ClientRecord) -> Option<[u8; 32]> {
    PublicKey::from_modulus(&client.modulus).ok().map(|key| key.fingerprint())
}

fn encode(asker: &Asker, message: &Message<'_>) -> Answered {
    let bytes = bytes_of(message, asker.mailbox.max_payload()).ok_or(Reason::TooLarge)?;
    Ok(Some(Owed::Answer(bytes)))
}

/// The encoded message, if it has at most `max` bytes.
fn bytes_of(message: &Message<'_>, max: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; max];
    let len = message.encode(&mut bytes).ok()?;
    bytes.truncate(len);
    bytes.shrink_to_fit();
    Some(bytes)
}
