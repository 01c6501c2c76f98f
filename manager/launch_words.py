"""What an attachment's row says of the instance that is started for it, however it is started."""

from manager.attachment_words import after_reset
from manager.hardware_pcrs import bit_map
from manager.launches import Launch
from storage.catalogue_rows import AttachmentRow, VtpmRow


def launch_for(row: VtpmRow, attachment: AttachmentRow, startup: str) -> Launch:
    """Return a launch without listeners, quota and rest: whoever starts it adds what it has of these."""
    return Launch(
        vtpm=row.uuid,
        lease=attachment.lease,
        family=row.family,
        frontend=attachment.frontend,
        owner_uid=int(attachment.owner.split(":")[0]),
        startup=startup,
        after_reset=after_reset(attachment),
        listeners=(),
        epoch=attachment.epoch,
        hw_pcrs=bit_map(attachment.hw_pcrs),
        measure=attachment.measure,
        measured=attachment.measured,
        localities=attachment.localities,
        maintenance=attachment.maintenance,
        trace=attachment.trace,
    )
