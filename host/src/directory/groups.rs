//! Groups: founding, answering an invitation, closing (PROTOCOL 9.2).
//!
//! What members sign is theirs to verify: it passes through unread. The server sees to it that a list names clients that
//! there are and the keys that they have, that only members speak, each once, and that everybody hears of it.

use std::sync::Arc;

use ossicle_core::{
    Answer, Body, CloseConversation, Closed, Fixed, Init, Invite, MAX_MEMBERS, MemberChanged, RECORD_OVERHEAD, Reason,
    direct_sid,
};
use tracing::info;
use uuid::Uuid;

use super::{Answered, Asker, Refusal, bytes_of, fingerprint};
use crate::mailbox::Owed;
use crate::server::Server;
use crate::store::{
    Announce, AnswerError, ClientId, CloseError, ConversationId, FoundError, Founding, Invitation, MemberAnswer,
    MemberState, Notice,
};

/// Bytes of an invitation but for the list, and more.
const INVITE_HEAD: usize = 512;
/// Bytes of what members are told of one of them, and more.
const NOTICE_LEN: usize = 160;

/// Opens a group and invites its members, all or none. `Done` comes when it is durable, not when they have answered.
pub(super) async fn init(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let init = Init::decode(body).map_err(|_| Reason::Malformed)?;
    let Init { request, sid, flags, signature, members, .. } = init;
    let invitees: Vec<_> = init.invitees(&asker.id).map_err(|_| Reason::Malformed)?.collect();
    // It counted as one already.
    let more = u32::try_from(invitees.len()).unwrap_or(u32::MAX).saturating_sub(1);
    server
        .limits
        .messages(&asker.id, more)
        .map_err(|wait| Refusal { reason: Reason::Rate, retry_after: Some(wait) })?;
    let ids: Vec<ClientId> = members.iter().map(|member| member.id).collect();
    if is_of_two(&sid, &ids) {
        return Err(Reason::NameInUse.into());
    }
    let mut invited = Vec::with_capacity(invitees.len());
    let mut key_epoch = None;
    // In the order of the members, as the names are.
    let mut names = invitees.into_iter().peekable();
    for member in members.iter() {
        let client = server.store.client(&member.id).await?.filter(|client| !client.revoked).ok_or(Reason::Unknown)?;
        if fingerprint(&client) != Some(member.key) {
            return Err(Reason::KeyChanged.into());
        }
        let Some((_, name)) = names.next_if(|(invitee, _)| invitee.id == member.id) else {
            key_epoch = Some(client.key_epoch);
            continue;
        };
        let invite = Invite { sid, creator: asker.id, flags, signature, members, name: Fixed(name) };
        let mut buffer = [0; INVITE_HEAD + MAX_MEMBERS * 48];
        let invite = invite.encode(&mut buffer).map_err(|_| Reason::TooLarge)?;
        let room = usize::from(client.record_limit).saturating_sub(RECORD_OVERHEAD);
        let notice = bytes_of(&invite, room).ok_or(Reason::TooLarge)?.into();
        invited.push(Invitation { client: client.id, key_epoch: client.key_epoch, notice });
    }
    let founding = Founding {
        sid,
        creator: asker.id,
        key_epoch: key_epoch.ok_or(Reason::Malformed)?,
        creator_only: flags.only_creator_closes(),
        signature: *signature.0,
        invited,
        now: server.now(),
    };
    let founded = server.store.found(founding).await.map_err(|error| match error {
        FoundError::Closed => Reason::Closed.into(),
        FoundError::InUse => Reason::NameInUse.into(),
        FoundError::KeyChanged => Reason::KeyChanged.into(),
        FoundError::TooMany => Reason::QueueFull.into(),
        FoundError::Store(error) => Refusal::from(error),
        FoundError::Unknown => Reason::Unknown.into(),
    })?;
    let others: Vec<_> = ids.iter().filter(|id| **id != asker.id).copied().collect();
    server.greet(&others).await;
    info!(sid = %Uuid::from_bytes(sid), by = %Uuid::from_bytes(asker.id), members = ids.len(), ?founded, "a group");
    Ok(Some(Owed::Done(request)))
}

/// Whether two of these have, or will have, a direct conversation under this id.
fn is_of_two(sid: &ConversationId, ids: &[ClientId]) -> bool {
    ids.iter().enumerate().any(|(place, one)| ids.iter().skip(place + 1).any(|other| direct_sid(one, other, 0) == *sid))
}

/// A member accepts or declines.
pub(super) async fn answer(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let Answer { request, sid, accept, signature } = Answer::decode(body).map_err(|_| Reason::Malformed)?;
    let now = server.now();
    let answer = MemberAnswer {
        sid,
        member: asker.id,
        accepts: accept,
        signature: *signature.0,
        oldest: server.oldest_invitation(now),
        now,
    };
    let told = server.store.answer(answer, announce()).await.map_err(|error| match error {
        AnswerError::Closed => Reason::Closed.into(),
        AnswerError::Expired => Reason::Expired.into(),
        AnswerError::Forbidden => Reason::Forbidden.into(),
        AnswerError::NotMember => Reason::NotMember.into(),
        AnswerError::Store(error) => Refusal::from(error),
    })?;
    server.greet(&told).await;
    Ok(Some(Owed::Done(request)))
}

/// A member closes the group for everybody.
pub(super) async fn close(server: &Server, asker: &Asker, body: Body<'_>) -> Answered {
    let CloseConversation { request, sid, signature } =
        CloseConversation::decode(body).map_err(|_| Reason::Malformed)?;
    server.close(&sid, &asker.id, signature.0).await.map_err(|error| match error {
        CloseError::Closed => Reason::Closed.into(),
        CloseError::Forbidden => Reason::Forbidden.into(),
        CloseError::NotMember => Reason::NotMember.into(),
        CloseError::Store(error) => Refusal::from(error),
    })?;
    info!(sid = %Uuid::from_bytes(sid), by = %Uuid::from_bytes(asker.id), "a group was closed");
    Ok(Some(Owed::Done(request)))
}

/// Encodes what members are told.
pub(crate) fn announce() -> Announce {
    Announce::new(encode)
}

fn encode(notice: &Notice) -> Option<Arc<[u8]>> {
    let (mut scratch, mut bytes) = ([0; NOTICE_LEN], [0; NOTICE_LEN]);
    let message = match notice {
        Notice::Changed { sid, member, state, signature } => {
            let state = match state {
                MemberState::Accepted => ossicle_core::MemberState::Accepted,
                MemberState::Declined => ossicle_core::MemberState::Declined,
                MemberState::Expired => ossicle_core::MemberState::Expired,
                MemberState::Revoked => ossicle_core::MemberState::Revoked,
                // Nobody becomes this.
                MemberState::Invited => return None,
            };
            let signature = signature.as_ref().map(Fixed);
            MemberChanged { sid: *sid, member: *member, state, signature }.encode(&mut scratch)
        }
        Notice::Closed { sid, by, signature } => {
            Closed { sid: *sid, by: Some(*by), signature: Some(Fixed(signature)) }.encode(&mut scratch)
        }
    };
    let len = message.ok()?.encode(&mut bytes).ok()?;
    bytes.get(..len).map(Arc::from)
}

#[cfg(test)]
mod tests {
    use ossicle_core::Message;

    use super::*;

    #[test]
    fn every_notice_there_is_has_room() {
        let signature = Some([7; 64]);
        for state in [MemberState::Accepted, MemberState::Declined, MemberState::Expired, MemberState::Revoked] {
            let bytes = encode(&Notice::Changed { sid: [0xff; 16], member: [0xff; 16], state, signature }).unwrap();
            let Ok(Message::Other(body)) = Message::decode(&bytes) else { panic!("{bytes:?}") };
            let changed = MemberChanged::decode(body).unwrap();
            assert_eq!(
                (changed.sid, changed.member, changed.signature),
                ([0xff; 16], [0xff; 16], Some(Fixed(&[7; 64])))
            );
        }
        let bytes = encode(&Notice::Closed { sid: [1; 16], by: [2; 16], signature: [3; 64] }).unwrap();
        let Ok(Message::Other(body)) = Message::decode(&bytes) else { panic!("{bytes:?}") };
        let closed = Closed { sid: [1; 16], by: Some([2; 16]), signature: Some(Fixed(&[3; 64])) };
        assert_eq!(Closed::decode(body), Ok(closed));
    }

    #[test]
    fn what_two_have_is_theirs() {
        let ids = [[1; 16], [2; 16], [3; 16]];
        assert!(is_of_two(&direct_sid(&[3; 16], &[2; 16], 0), &ids));
        assert!(!is_of_two(&direct_sid(&[3; 16], &[4; 16], 0), &ids));
    }
}
